"""Settings of a config that change the model, and the values at which they don't.

A family's config function reads the settings that its architecture has. Any other setting of this
table must be at rest, for our decoder would pass over it in silence.
"""

import reprlib
from typing import Any

from converters.rules import Family
from jhessians.errors import CheckpointError
from jhessians.models.layers import ACTIVATIONS

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (None, False),
    "alibi": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "decoder_sparse_step": (None, 1),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (None, False),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mlp_only_layers": (None, []),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "qk_layernorm": (None, False),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "sliding_window": (None,),
    "swiglu_alpha": (None, 1.702),
    "use_bidirectional_attention": (None, False),
    "use_qk_norm": (None, False),
}

SIZES: dict[str, int] = dict.fromkeys(
    (
        "hidden_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size",
        "moe_intermediate_size", "shared_expert_intermediate_size", "word_embed_proj_dim",
        "num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim", "vocab_size",
    ),
    2**24,
) | {"num_hidden_layers": 100_000, "max_position_embeddings": 2**31 - 1}  # fmt: skip
"""Settings that count something, and the most that any model of this century has of it."""


def check_sizes(config: Any) -> None:
    """Refuse sizes that no model has, before anything is computed from them.

    Raises:
        CheckpointError: If one is no whole number, below one or absurd.
    """
    for name, largest in SIZES.items():
        given = getattr(config, name, None)
        if given is not None and not (type(given) is int and 1 <= given <= largest):
            name = getattr(config, "attribute_map", {}).get(name, name)
            raise CheckpointError(
                f"config.json sets {name} to {reprlib.repr(given)}; expected a whole number from "
                f"1 to {largest}"
            )


def check_neutral(family: Family, config: Any) -> None:
    """Refuse settings that belong to another architecture.

    Raises:
        CheckpointError: If one that the family doesn't read is not at rest.
    """
    for name, values in NEUTRAL.items():
        given = getattr(config, name, None)
        if name not in family.reads and given not in values:
            raise CheckpointError(
                f"config.json sets {name} to {given!r}, which {family.model_type} models don't "
                f"have here; expected {' or '.join(map(repr, values[1:] or values))}"
            )


def activation(name: str) -> str:
    """The name, if it is an activation that the decoder has.

    Returns:
        The name as given.

    Raises:
        CheckpointError: If it isn't.
    """
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json asks for the activation {name!r}; expected one of "
            f"{', '.join(sorted(ACTIVATIONS))}"
        )
    return name
