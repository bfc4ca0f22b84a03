"""Nemotron-4 and Minitron."""

from typing import Any

from converters.common import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    INPUT_NORMS,
    LAYER,
    decoder,
    head_size,
)
from converters.rope import rope_config
from converters.rules import Family, linear
from jhessians.models.config import DecoderConfig, NormConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' NemotronConfig, read by ours."""
    return decoder(
        config,
        norm=NormConfig("layer", config.norm_eps, bias=True, offset=1.0),
        ropes=[rope_config(config, head_size(config), partial=True)],
        attention={"bias": config.attention_bias, "output_bias": config.attention_bias},
        mlp={"variant": "plain", "bias": config.mlp_bias},
    )


FAMILIES = (
    Family(
        model_type="nemotron",
        architecture="NemotronForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(
            *EMBEDDINGS,
            *ATTENTION,
            *linear(f"{BLOCK}.mlp.up", f"{LAYER}.mlp.up_proj"),
            *linear(f"{BLOCK}.mlp.down", f"{LAYER}.mlp.down_proj"),
            *INPUT_NORMS,
        ),
        title="Nemotron-4, Minitron",
        checked="layer norms around 1 + w, squared ReLU, partial rotation",
    ),
)
