"""Llama 2 and 3, and what was made in their likeness: SmolLM2, TinyLlama, Vicuna, ..."""

from typing import Any

from converters.common import (
    ATTENTION,
    EMBEDDINGS,
    GATED_MLP,
    INPUT_NORMS,
    ROTARY_BUFFERS,
    decoder,
    rms,
)
from converters.rope import rope_config
from converters.rules import Family
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' LlamaConfig, read by ours."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, config.head_dim)],
        attention={"bias": config.attention_bias, "output_bias": config.attention_bias},
        mlp={"bias": config.mlp_bias},
    )


FAMILIES = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *GATED_MLP),
        ignored=(ROTARY_BUFFERS,),
        title="Llama 2 and 3, SmolLM2, TinyLlama",
        checked="every rope scaling (linear, dynamic, llama3, yarn, longrope), biases, wide heads",
    ),
)
