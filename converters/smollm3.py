"""SmolLM3."""

from typing import Any

from converters.common import (
    ATTENTION,
    EMBEDDINGS,
    GATED_MLP,
    INPUT_NORMS,
    decoder,
    head_size,
    rms,
    windows,
)
from converters.rope import rope_config
from converters.rules import Family
from jhessians.errors import CheckpointError
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' SmolLM3Config, read by ours."""
    # Despite its name `no_rope_layers` marks by 1 the layers that have rope.
    rotated, layers = config.no_rope_layers, config.num_hidden_layers
    if len(rotated) != layers:
        raise CheckpointError(
            f"config.json gives {len(rotated)} no_rope_layers; expected {layers}, one per layer"
        )
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={
            "bias": config.attention_bias,
            "output_bias": config.attention_bias,
            "windows": windows(config),
            "layer_ropes": tuple(0 if one else None for one in rotated),
        },
        mlp={"bias": config.mlp_bias},
    )


FAMILIES = (
    Family(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *GATED_MLP),
        reads=frozenset({"no_rope_layers", "sliding_window"}),
        title="SmolLM3",
        checked="layers without rope",
    ),
)
