"""OLMo 1, 2 and 3, and OLMoE."""

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
    windows,
)
from converters.rope import rope_config
from converters.rules import TRANSPOSE, Family, Rule, norm
from jhessians.models.config import DecoderConfig, NormConfig


def _biases(config: Any) -> dict[str, Any]:
    return {"bias": config.attention_bias, "output_bias": config.attention_bias}


def olmo(config: Any) -> DecoderConfig:
    """transformers' OlmoConfig, read by ours. Its norms have no parameters."""
    return decoder(
        config,
        norm=NormConfig("layer", 1e-5, scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={**_biases(config), "clip": config.clip_qkv},
    )


def olmo2(config: Any) -> DecoderConfig:
    """transformers' Olmo2Config, read by ours."""
    return decoder(
        config,
        norm=rms(config),
        ropes=[rope_config(config, head_size(config))],
        attention={**_biases(config), "qk_norm": rms(config), "qk_norm_span": "all"},
        norm_placement="output",
    )


def olmo3(config: Any) -> DecoderConfig:
    """transformers' Olmo3Config, read by ours."""
    types = ["full_attention", "sliding_attention"]
    return decoder(
        config,
        norm=rms(config),
        ropes=[rope_config(config, head_size(config), layer_type=each) for each in types],
        attention={
            **_biases(config),
            "qk_norm": rms(config),
            "qk_norm_span": "all",
            "windows": windows(config),
            "layer_ropes": tuple(types.index(each) for each in config.layer_types),
        },
        norm_placement="output",
    )


def olmoe(config: Any) -> DecoderConfig:
    """transformers' OlmoeConfig, read by ours."""
    norms = rms(config, wide_scale=False)
    return decoder(
        config,
        norm=norms,
        ropes=[rope_config(config, head_size(config))],
        attention={
            **_biases(config),
            "qk_norm": norms,
            "qk_norm_span": "all",
            "clip": config.clip_qkv,
        },
        experts=experts(config, config.intermediate_size, normalize=config.norm_topk_prob),
    )


OUTPUT_NORMS = (
    *norm(f"{BLOCK}.attention_output_norm", f"{LAYER}.post_attention_layernorm"),
    *norm(f"{BLOCK}.mlp_output_norm", f"{LAYER}.post_feedforward_layernorm"),
)

FAMILIES = (
    Family(
        model_type="olmo",
        architecture="OlmoForCausalLM",
        base_prefix="model",
        config=olmo,
        rules=(*EMBEDDINGS, *ATTENTION, *GATED_MLP),
        reads=frozenset({"clip_qkv"}),
        title="OLMo",
        checked="norms without parameters, clipped queries, keys and values",
    ),
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        base_prefix="model",
        config=olmo2,
        rules=(*EMBEDDINGS, *ATTENTION, *QK_NORM, *GATED_MLP, *OUTPUT_NORMS),
        title="OLMo 2",
        checked="normed outputs, queries and keys normed across heads",
    ),
    Family(
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        base_prefix="model",
        config=olmo3,
        rules=(*EMBEDDINGS, *ATTENTION, *QK_NORM, *GATED_MLP, *OUTPUT_NORMS),
        reads=frozenset({"sliding_window"}),
        title="OLMo 3",
        checked="three windows to one full layer, yarn in the full ones",
    ),
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        base_prefix="model",
        config=olmoe,
        rules=(
            *EMBEDDINGS,
            *INPUT_NORMS,
            *ATTENTION,
            *QK_NORM,
            Rule(f"{BLOCK}.mlp.router", f"{LAYER}.mlp.gate.weight", TRANSPOSE),
            *each_expert("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
        modules=EXPERTS,
        reads=frozenset({"clip_qkv", "num_experts", "num_local_experts"}),
        title="OLMoE",
        checked="mixture of experts, queries and keys normed across heads and clipped",
    ),
)
