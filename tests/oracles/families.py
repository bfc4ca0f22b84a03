"""Model families that the oracles can build: one small configuration each, as data.

A size is chosen so that no two of a config's dimensions coincide by accident: the intermediate size
is no multiple of the hidden one, key-value heads are fewer than heads, rotary parts are partial.
"""

from collections.abc import Callable
from typing import Any

MAX_POSITIONS = 128

# Norm classes that scale by 1 + weight: their weights scatter around 0.
ZERO_CENTRED_NORMS: frozenset[str] = frozenset(
    {"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "NemotronLayerNorm1P"}
)


def _gpt_neox(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 136,
        "max_position_embeddings": MAX_POSITIONS,
        "rotary_pct": 0.5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    }


def _llama(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 104,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
    }


def _gpt2(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 104,
        "n_positions": MAX_POSITIONS,
    }


# Family (transformers' model_type) -> config arguments for a vocabulary of that size.
FAMILIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "gpt2": _gpt2,
}

# Families whose tokenizer puts a beginning-of-sequence token before every document.
PREFIXED_FAMILIES: frozenset[str] = frozenset({"llama"})
