"""Granite 3 and its mixtures of experts."""

from typing import Any

from converters.common import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    GATED_MLP,
    INPUT_NORMS,
    LAYER,
    decoder,
    experts,
    head_size,
    rms,
)
from converters.rope import rope_config
from converters.rules import TRANSPOSE, Family, Rule
from jhessians.models.config import DecoderConfig


def granite(config: Any, **changes: Any) -> DecoderConfig:
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
        embedding_scale=float(config.embedding_multiplier),
        residual_scale=float(config.residual_multiplier),
        logit_scale=1 / config.logits_scaling,
        **changes,
    )


MULTIPLIERS = frozenset(
    {"attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"}
)
SPARSE = "block_sparse_moe"

FAMILIES = (
    Family(
        model_type="granite",
        architecture="GraniteForCausalLM",
        base_prefix="model",
        config=lambda config: granite(config, mlp={"bias": config.mlp_bias}),
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *GATED_MLP),
        reads=MULTIPLIERS,
        title="Granite 3",
        checked="multipliers of embedding, attention, residual and logits",
    ),
    Family(
        model_type="granitemoe",
        architecture="GraniteMoeForCausalLM",
        base_prefix="model",
        config=lambda config: granite(config, experts=experts(config, config.intermediate_size)),
        rules=(
            *EMBEDDINGS,
            *INPUT_NORMS,
            *ATTENTION,
            Rule(f"{BLOCK}.mlp.router", f"{LAYER}.{SPARSE}.router.layer.weight", TRANSPOSE),
            Rule(f"{BLOCK}.mlp.gate_up.kernel", f"{LAYER}.{SPARSE}.input_linear.weight", TRANSPOSE),
            Rule(f"{BLOCK}.mlp.down.kernel", f"{LAYER}.{SPARSE}.output_linear.weight", TRANSPOSE),
        ),
        modules=(
            (
                f"{BLOCK}.mlp.gate_up",
                f"layers.{{layer}}.{SPARSE}.experts.expert_{{expert}}.gate_up_proj",
            ),
            (f"{BLOCK}.mlp.down", f"layers.{{layer}}.{SPARSE}.experts.expert_{{expert}}.down_proj"),
        ),
        reads=MULTIPLIERS | {"num_local_experts", "num_experts"},
        title="Granite 3 MoE",
        checked="mixture of experts, multipliers",
    ),
)
