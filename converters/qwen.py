"""Qwen 1.5, 2, 2.5 and 3 and their mixtures of experts; QwQ, DeepSeek's distillations."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from converters.common import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    EXPERTS,
    GATED_MLP,
    INPUT_NORMS,
    LAYER,
    QK_NORM,
    decoder,
    each_expert,
    experts,
    head_size,
    rms,
    same_window,
    windows,
)
from converters.rope import rope_config
from converters.rules import TRANSPOSE, Family, Rule, linear
from jhessians.models.config import DecoderConfig, ExpertsConfig, MLPConfig

Windows = Callable[[Any], tuple[int | None, ...]]


def qwen2(config: Any, *, bias: bool = True, **changes: Any) -> DecoderConfig:
    """transformers' Qwen2Config, read by ours."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={"bias": bias, "windows": windows(config)},
        **changes,
    )


def qwen3(config: Any, *, limits: Windows = windows, **changes: Any) -> DecoderConfig:
    """transformers' Qwen3Config, read by ours; `limits` tells the layers' windows."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={
            "bias": config.attention_bias,
            "output_bias": config.attention_bias,
            "windows": limits(config),
            "qk_norm": rms(config, wide_scale=False),
        },
        **changes,
    )


def mixture(config: Any) -> ExpertsConfig:
    """The experts of both generations."""
    return experts(config, config.moe_intermediate_size, normalize=config.norm_topk_prob)


def qwen2_moe(config: Any) -> DecoderConfig:
    """transformers' Qwen2MoeConfig, read by ours."""
    chosen = mixture(config)
    shared = MLPConfig(config.shared_expert_intermediate_size, chosen.mlp.activation)
    return qwen2(config, bias=config.qkv_bias, experts=replace(chosen, shared=shared))


def qwen3_moe(config: Any) -> DecoderConfig:
    """transformers' Qwen3MoeConfig, read by ours."""
    return qwen3(config, limits=same_window, experts=mixture(config))


MIXTURE = (
    Rule(f"{BLOCK}.mlp.router", f"{LAYER}.mlp.gate.weight", TRANSPOSE),
    *each_expert("mlp", "gate_proj", "up_proj", "down_proj"),
)
SHARED = (
    *linear(f"{BLOCK}.mlp.shared.gate", f"{LAYER}.mlp.shared_expert.gate_proj"),
    *linear(f"{BLOCK}.mlp.shared.up", f"{LAYER}.mlp.shared_expert.up_proj"),
    *linear(f"{BLOCK}.mlp.shared.down", f"{LAYER}.mlp.shared_expert.down_proj"),
    *linear(f"{BLOCK}.mlp.shared_gate", f"{LAYER}.mlp.shared_expert_gate"),
)
LAYOUT = frozenset({"sliding_window", "num_experts", "num_local_experts"})

FAMILIES = (
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        base_prefix="model",
        config=qwen2,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *GATED_MLP),
        reads=frozenset({"sliding_window"}),
        title="Qwen2, Qwen2.5, QwQ",
        checked="biases on query, key and value only, windows in the upper layers",
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        base_prefix="model",
        config=qwen3,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *QK_NORM, *GATED_MLP),
        reads=frozenset({"sliding_window"}),
        title="Qwen3",
        checked="normed queries and keys",
    ),
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        base_prefix="model",
        config=qwen2_moe,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *MIXTURE, *SHARED),
        modules=EXPERTS,
        reads=LAYOUT,
        title="Qwen1.5-MoE, Qwen2-MoE",
        checked="mixture of experts with a gated shared one, windows",
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        base_prefix="model",
        config=qwen3_moe,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *QK_NORM, *MIXTURE),
        modules=EXPERTS,
        reads=LAYOUT,
        title="Qwen3-MoE",
        checked="mixture of experts, normed queries and keys",
    ),
)
