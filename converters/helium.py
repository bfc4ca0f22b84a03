"""Helium 1."""

from typing import Any

from converters.common import (
    ATTENTION,
    EMBEDDINGS,
    GATED_MLP,
    INPUT_NORMS,
    decoder,
    head_size,
    rms,
)
from converters.rope import rope_config
from converters.rules import Family
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' HeliumConfig, read by ours."""
    return decoder(
        config,
        norm=rms(config),
        ropes=[rope_config(config, head_size(config), interleaved=True)],
        attention={"bias": config.attention_bias},
        mlp={"bias": config.mlp_bias},
    )


FAMILIES = (
    Family(
        model_type="helium",
        architecture="HeliumForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *GATED_MLP),
        title="Helium 1",
        checked="interleaved rotation",
    ),
)
