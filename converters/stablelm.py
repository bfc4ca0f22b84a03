"""StableLM 3B, 1.6B, 12B, Zephyr 3B, Stable Code."""

from typing import Any

from converters.common import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    GATED_MLP,
    INPUT_NORMS,
    LAYER,
    decoder,
    head_size,
)
from converters.rope import rope_config
from converters.rules import Family, Rule
from jhessians.models.config import DecoderConfig, NormConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' StableLmConfig, read by ours."""
    per_head = NormConfig("layer", config.layer_norm_eps)
    return decoder(
        config,
        norm=NormConfig("layer", config.layer_norm_eps, bias=True),
        ropes=[rope_config(config, head_size(config), partial=True)],
        attention={
            "bias": config.use_qkv_bias,
            "qk_norm": per_head if config.qk_layernorm else None,
            "qk_norm_span": "heads",
        },
        residual="shared" if config.use_parallel_residual else "sequential",
    )


FAMILIES = (
    Family(
        model_type="stablelm",
        architecture="StableLmForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(
            *EMBEDDINGS,
            *ATTENTION,
            *GATED_MLP,
            *INPUT_NORMS,
            Rule(
                f"{BLOCK}.attention.query_norm.scale",
                f"{LAYER}.self_attn.q_layernorm.norms.{{head}}.weight",
            ),
            Rule(
                f"{BLOCK}.attention.key_norm.scale",
                f"{LAYER}.self_attn.k_layernorm.norms.{{head}}.weight",
            ),
        ),
        reads=frozenset({"qk_layernorm"}),
        title="StableLM, Stable Code",
        checked="partial rotation, a norm per head, sequential and parallel residuals",
    ),
)
