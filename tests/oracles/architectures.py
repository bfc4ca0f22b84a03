"""One small configuration of every dense decoder, as data, beside those of `families`.

A base that most of them share, and what is each one's own. Windows are shorter than the documents
of the tests, groups of heads are uneven, and no multiplier is 1.
"""

from collections.abc import Callable
from typing import Any

from tests.oracles.families import FAMILIES, MAX_POSITIONS

_BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "beta_fast": 8.0,
         "original_max_position_embeddings": 32}  # fmt: skip


def _like_llama(**own: Any) -> Callable[[int], dict[str, Any]]:
    return lambda vocabulary: {"vocab_size": vocabulary, **_BASE, **own}


def _with_names(**own: Any) -> Callable[[int], dict[str, Any]]:
    return lambda vocabulary: {"vocab_size": vocabulary, **own}


_GPT_J = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 72, "n_positions": MAX_POSITIONS}
_SOFT = {"head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 9}

ARCHITECTURES: dict[str, Callable[[int], dict[str, Any]]] = {
    **FAMILIES,
    "bloom": _with_names(hidden_size=36, n_layer=2, n_head=6, seq_length=MAX_POSITIONS),
    "cohere": _like_llama(logit_scale=0.3, tie_word_embeddings=True),
    "cohere2": _like_llama(
        logit_scale=0.3,
        tie_word_embeddings=True,
        num_hidden_layers=3,
        layer_types=_WINDOWS,
        sliding_window=9,
    ),
    "exaone4": _like_llama(num_hidden_layers=3, layer_types=_WINDOWS, sliding_window=9),
    "falcon": _with_names(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_hidden_size=72,
        max_position_embeddings=MAX_POSITIONS,
    ),
    "gemma": _like_llama(head_dim=12, tie_word_embeddings=True),
    "gemma2": _like_llama(
        **_SOFT,
        tie_word_embeddings=True,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma3_text": _like_llama(
        **_SOFT,
        tie_word_embeddings=True,
        num_hidden_layers=3,
        layer_types=_WINDOWS,
        final_logit_softcapping=3.0,
        max_position_embeddings=32,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "glm4": _like_llama(head_dim=12, attention_bias=True, partial_rotary_factor=0.5),
    "gpt_oss": _like_llama(
        head_dim=8,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=9,
        swiglu_limit=1.0,
        num_hidden_layers=3,
        layer_types=_WINDOWS,
        rope_parameters={**_YARN, "truncate": False},
    ),
    "gpt_neo": _with_names(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=72,
        window_size=9,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=MAX_POSITIONS,
    ),
    "gptj": _with_names(**_GPT_J, rotary_dim=4, tie_word_embeddings=False),
    "granite": _like_llama(
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        logits_scaling=2.5,
    ),
    "granitemoe": _like_llama(
        num_local_experts=6,
        num_experts_per_tok=3,
        intermediate_size=24,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        logits_scaling=2.5,
    ),
    "helium": _like_llama(head_dim=8),
    "mistral": _like_llama(sliding_window=9, head_dim=12),
    "mixtral": _like_llama(sliding_window=9, num_local_experts=4, intermediate_size=40),
    "nemotron": _like_llama(partial_rotary_factor=0.5),
    "olmo": _like_llama(clip_qkv=1.5),
    "olmo2": _like_llama(),
    "olmo3": _like_llama(
        num_hidden_layers=3,
        layer_types=_WINDOWS,
        sliding_window=9,
        rope_parameters={
            "full_attention": _YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    ),
    "olmoe": _like_llama(num_experts=8, num_experts_per_tok=3, intermediate_size=24, clip_qkv=1.5),
    "opt": _with_names(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=72,
        max_position_embeddings=MAX_POSITIONS,
    ),
    "phi": _like_llama(),
    "phi3": _like_llama(sliding_window=9),
    "qwen2": _like_llama(use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen2_moe": _like_llama(
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "qwen3": _like_llama(head_dim=12),
    "qwen3_moe": _like_llama(
        head_dim=12,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "smollm3": _like_llama(no_rope_layers=[1, 0]),
    "stablelm": _like_llama(partial_rotary_factor=0.5, use_qkv_bias=True),
    "starcoder2": _like_llama(sliding_window=9),
}
