"""StarCoder2."""

from typing import Any

from converters.common import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    INPUT_NORMS,
    LAYER,
    decoder,
    head_size,
    same_window,
)
from converters.rope import rope_config
from converters.rules import Family, linear
from jhessians.models.config import DecoderConfig, NormConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' Starcoder2Config, read by ours."""
    return decoder(
        config,
        norm=NormConfig("layer", config.norm_epsilon, bias=True),
        ropes=[rope_config(config, head_size(config))],
        attention={
            "bias": config.use_bias,
            "output_bias": config.use_bias,
            "windows": same_window(config),
        },
        mlp={"variant": "plain", "bias": config.use_bias},
    )


FAMILIES = (
    Family(
        model_type="starcoder2",
        architecture="Starcoder2ForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(
            *EMBEDDINGS,
            *ATTENTION,
            *linear(f"{BLOCK}.mlp.up", f"{LAYER}.mlp.c_fc"),
            *linear(f"{BLOCK}.mlp.down", f"{LAYER}.mlp.c_proj"),
            *INPUT_NORMS,
        ),
        reads=frozenset({"sliding_window"}),
        title="StarCoder2",
        checked="biases everywhere, sliding window",
    ),
)
