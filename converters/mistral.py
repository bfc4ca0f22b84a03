"""Mistral 7B, Nemo, Small and others of that architecture."""

from typing import Any

from converters.common import (
    ATTENTION,
    EMBEDDINGS,
    GATED_MLP,
    INPUT_NORMS,
    ROTARY_BUFFERS,
    decoder,
    head_size,
    rms,
    same_window,
)
from converters.rope import rope_config
from converters.rules import Family
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' MistralConfig, read by ours."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={"windows": same_window(config)},
    )


FAMILIES = (
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *GATED_MLP),
        ignored=(ROTARY_BUFFERS,),
        reads=frozenset({"sliding_window"}),
        title="Mistral, Zephyr",
        checked="sliding window",
    ),
)
