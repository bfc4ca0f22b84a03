"""Phi-3, Phi-3.5 and Phi-4 (those that are neither multimodal nor a mixture of experts)."""

from typing import Any

from converters.common import (
    BLOCK,
    EMBEDDINGS,
    INPUT_NORMS,
    LAYER,
    decoder,
    head_size,
    rms,
    same_window,
)
from converters.rope import rope_config
from converters.rules import Family, linear
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' Phi3Config, read by ours."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config), partial=True)],
        attention={"fused": "blocks", "windows": same_window(config)},
        mlp={"variant": "fused"},
    )


FAMILIES = (
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(
            *EMBEDDINGS,
            *linear(f"{BLOCK}.attention.query_key_value", f"{LAYER}.self_attn.qkv_proj"),
            *linear(f"{BLOCK}.attention.output", f"{LAYER}.self_attn.o_proj"),
            *linear(f"{BLOCK}.mlp.gate_up", f"{LAYER}.mlp.gate_up_proj"),
            *linear(f"{BLOCK}.mlp.down", f"{LAYER}.mlp.down_proj"),
            *INPUT_NORMS,
        ),
        reads=frozenset({"sliding_window"}),
        title="Phi-3, Phi-3.5, Phi-4",
        checked="fused projections of attention and MLP, sliding window, longrope",
    ),
)
