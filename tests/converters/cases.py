"""What the tests of families vary, as data: settings that change an architecture, and twins of it
that are wrong in one.

Documents are up to 50 tokens long: longer than every window, and than an original context of 32.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jhessians.models.config import DecoderConfig


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e3, **settings}}


SHORT = {"max_position_embeddings": 32}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
LONGROPE = {"short_factor": [1.0, 1.3, 1.7, 2.5], "long_factor": [1.1, 2.0, 4.0, 9.0]}

# Name -> family and settings, beside those of `architectures`.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom, a power of two of heads": ("bloom", {"n_head": 4, "tie_word_embeddings": False}),
    "cohere, normed queries": ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    "exaone4, no windows": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "falcon 40b": ("falcon", NEW_FALCON),
    "falcon 11b": (
        "falcon",
        {**NEW_FALCON, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    ),
    "falcon rw": (
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon, dynamic rope": ("falcon", {**SHORT, **rope("dynamic", factor=2.0)}),
    "gptj, tied": ("gptj", {"n_inner": None, "tie_word_embeddings": True}),
    "granite, biased": (
        "granite",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "helium, biased": ("helium", {"attention_bias": True, "mlp_bias": True}),
    "llama, longrope": (
        "llama",
        rope("longrope", **{k: [*v, 3.0, 3.0] for k, v in LONGROPE.items()}, factor=4.0,
             original_max_position_embeddings=32),
    ),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": None}),
    "nemotron, biased": ("nemotron", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "opt 350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt, bare": (
        "opt",
        {"layer_norm_elementwise_affine": False, "enable_bias": False,
         "_remove_final_layer_norm": True, "tie_word_embeddings": False},
    ),
    "phi, normed queries": ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "phi3, longrope": (
        "phi3",
        {**rope("longrope", **{k: v[:3] for k, v in LONGROPE.items()}),
         "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75,
         "sliding_window": None},
    ),
    "qwen2, yarn": ("qwen2", {**SHORT, "use_sliding_window": False, **rope("yarn", factor=4.0)}),
    "qwen3, biased": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "smollm3, windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 9, "mlp_bias": True,
         "attention_bias": True},
    ),
    "stablelm 12b": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "starcoder2, bare": ("starcoder2", {"sliding_window": None, "use_bias": False}),
}  # fmt: skip

# Those that mostly turn on or off what other cases turn on.
SLOW = {
    "bloom, a power of two of heads", "falcon 11b", "gptj, tied", "granite, biased",
    "helium, biased", "mistral, no window", "nemotron, biased", "opt, bare", "qwen3, biased",
    "smollm3, windows", "starcoder2, bare",
}  # fmt: skip

# transformers' eager attention adds Falcon's linear biases twice; its default attention, once.
SDPA = {"falcon rw"}

SWAPPED = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}


def halves(config: DecoderConfig) -> DecoderConfig:
    """The other way to pair the features that are rotated together."""
    attention = config.attention
    ropes = tuple(replace(r, interleaved=not r.interleaved) for r in attention.ropes)
    return replace(config, attention=replace(attention, ropes=ropes))


def no_offset(config: DecoderConfig) -> DecoderConfig:
    """Norms that multiply by w instead of 1 + w."""
    return replace(config, norm=replace(config.norm, offset=0.0))


def after_norm(config: DecoderConfig) -> DecoderConfig:
    """The MLP reads what attention has already been added to."""
    return replace(config, residual="sequential" if config.residual != "sequential" else "parallel")


def first_position(config: DecoderConfig) -> DecoderConfig:
    """Positions one row too early in their table."""
    return replace(
        config, position_offset=config.position_offset - 1, positions=config.positions + 1
    )


def other_scale(config: DecoderConfig) -> DecoderConfig:
    """Attention scaled by the root of the head size, where a family has a scale of its own."""
    return replace(config, attention=replace(config.attention, scales=()))


def unnormed(config: DecoderConfig) -> DecoderConfig:
    """A larger epsilon below queries and keys alone."""
    norm = config.attention.qk_norm
    assert norm is not None
    wrong = replace(norm, epsilon=0.05)
    return replace(config, attention=replace(config.attention, qk_norm=wrong))


def swapped_halves(config: DecoderConfig) -> DecoderConfig:
    """All of gate and then all of up, where they take turns."""
    assert config.experts is not None
    mlp = replace(config.experts.mlp, variant="fused")
    return replace(config, experts=replace(config.experts, mlp=mlp))


def unshared(config: DecoderConfig) -> DecoderConfig:
    """Another activation in the MLP that all tokens share."""
    assert config.experts is not None and config.experts.shared is not None
    shared = replace(config.experts.shared, activation="gelu")
    return replace(config, experts=replace(config.experts, shared=shared))


# Family -> settings of config.json, or changes of what we make of them, each of which is wrong.
TWINS: dict[str, list[dict[str, Any] | Callable[[DecoderConfig], DecoderConfig]]] = {
    "bloom": [{"n_head": 4}],
    "cohere": [{"logit_scale": 0.301}, halves],
    "cohere2": [SWAPPED],
    "exaone4": [SWAPPED],
    "falcon": [rope("default")],
    "gemma": [no_offset],
    "gemma2": [{"attn_logit_softcapping": 2.1}, other_scale],
    "gemma3_text": [
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e5},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}},
    ],
    "glm4": [halves],
    "gpt2": [{"n_head": 2}],
    "gpt_neo": [{"window_size": 10}, other_scale],
    "gpt_neox": [{"use_parallel_residual": False}],
    "gpt_oss": [{"swiglu_limit": 0.9}, {"num_experts_per_tok": 3}, swapped_halves],
    "gptj": [halves],
    "granite": [{"residual_multiplier": 0.61}],
    "granitemoe": [{"num_experts_per_tok": 2}],
    "helium": [halves],
    "llama": [rope("default")],
    "mistral": [{"sliding_window": 10}],
    "mixtral": [{"num_experts_per_tok": 1}],
    "nemotron": [no_offset],
    "olmo": [{"clip_qkv": 1.6}],
    "olmo2": [unnormed],
    "olmo3": [{**SWAPPED}],
    "olmoe": [{"norm_topk_prob": True}],
    "opt": [first_position],
    "phi": [{"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}],
    "phi3": [{"sliding_window": 10}],
    "qwen2": [{"layer_types": ["sliding_attention", "full_attention"]}],
    "qwen2_moe": [{"norm_topk_prob": True}, unshared],
    "qwen3": [unnormed],
    "qwen3_moe": [{"norm_topk_prob": False}],
    "smollm3": [{"no_rope_layers": [0, 1]}],
    "stablelm": [{"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}],
    "starcoder2": [{"sliding_window": 10}],
}  # fmt: skip
