"""EXAONE 4.0."""

from typing import Any

from converters.common import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    GATED_MLP,
    LAYER,
    QK_NORM,
    decoder,
    head_size,
    rms,
    windows,
)
from converters.rope import rope_config
from converters.rules import Family, norm
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' Exaone4Config, read by ours."""
    sizes = windows(config)  # where some layers have windows, only those rotate
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={
            "windows": sizes,
            "layer_ropes": tuple(None if size is None else 0 for size in sizes),
            "qk_norm": rms(config, wide_scale=False),
        },
        norm_placement="output",
    )


FAMILIES = (
    Family(
        model_type="exaone4",
        architecture="Exaone4ForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(
            *EMBEDDINGS,
            *ATTENTION,
            *QK_NORM,
            *GATED_MLP,
            *norm(f"{BLOCK}.attention_output_norm", f"{LAYER}.post_attention_layernorm"),
            *norm(f"{BLOCK}.mlp_output_norm", f"{LAYER}.post_feedforward_layernorm"),
        ),
        reads=frozenset({"sliding_window"}),
        title="EXAONE 4.0",
        checked="normed outputs, rotation only in layers with a window; no windows at all (1.2B)",
    ),
)
