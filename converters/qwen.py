"""Qwen 2, 2.5 and 3, without their mixtures of experts; QwQ, DeepSeek's distillations."""

from typing import Any

from converters.common import (
    ATTENTION,
    EMBEDDINGS,
    GATED_MLP,
    INPUT_NORMS,
    QK_NORM,
    decoder,
    head_size,
    rms,
    windows,
)
from converters.rope import rope_config
from converters.rules import Family
from jhessians.models.config import DecoderConfig


def qwen2(config: Any) -> DecoderConfig:
    """transformers' Qwen2Config, read by ours."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={"bias": True, "windows": windows(config)},
    )


def qwen3(config: Any) -> DecoderConfig:
    """transformers' Qwen3Config, read by ours."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={
            "bias": config.attention_bias,
            "output_bias": config.attention_bias,
            "windows": windows(config),
            "qk_norm": rms(config, wide_scale=False),
        },
    )


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
)
