"""Mistral 7B, Nemo, Small and others of that architecture; Mixtral."""

from typing import Any

from converters.common import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    EXPERTS,
    GATED_MLP,
    INPUT_NORMS,
    LAYER,
    ROTARY_BUFFERS,
    decoder,
    each_expert,
    experts,
    head_size,
    rms,
    same_window,
)
from converters.rope import rope_config
from converters.rules import TRANSPOSE, Family, Rule
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any, **changes: Any) -> DecoderConfig:
    """transformers' MistralConfig, read by ours."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config))],
        attention={"windows": same_window(config)},
        **changes,
    )


def mixtral(config: Any) -> DecoderConfig:
    """transformers' MixtralConfig, read by ours."""
    return decoder_config(config, experts=experts(config, config.intermediate_size))


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
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        base_prefix="model",
        config=mixtral,
        rules=(
            *EMBEDDINGS,
            *INPUT_NORMS,
            *ATTENTION,
            Rule(f"{BLOCK}.mlp.router", f"{LAYER}.block_sparse_moe.gate.weight", TRANSPOSE),
            *each_expert("block_sparse_moe", "w1", "w3", "w2"),
        ),
        modules=EXPERTS,
        ignored=(ROTARY_BUFFERS,),
        reads=frozenset({"sliding_window", "num_local_experts", "num_experts"}),
        title="Mixtral",
        checked="mixture of experts, sliding window",
    ),
)
