"""Granite 3, without its mixtures of experts."""

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
    """transformers' GraniteConfig, read by ours."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={
            "bias": config.attention_bias,
            "output_bias": config.attention_bias,
            "scales": (float(config.attention_multiplier),) * config.num_hidden_layers,
        },
        mlp={"bias": config.mlp_bias},
        embedding_scale=float(config.embedding_multiplier),
        residual_scale=float(config.residual_multiplier),
        logit_scale=1 / config.logits_scaling,
    )


FAMILIES = (
    Family(
        model_type="granite",
        architecture="GraniteForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *GATED_MLP),
        reads=frozenset(
            {
                "attention_multiplier",
                "embedding_multiplier",
                "logits_scaling",
                "residual_multiplier",
            }
        ),
        title="Granite 3",
        checked="multipliers of embedding, attention, residual and logits",
    ),
)
