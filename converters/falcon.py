"""Falcon 7B, 40B, 180B, RW and Falcon 2."""

from dataclasses import replace
from typing import Any

from converters.common import decoder, head_size
from converters.rope import rope_config
from converters.rules import Family, Rule, linear, norm
from jhessians.errors import CheckpointError
from jhessians.models.config import AlibiConfig, DecoderConfig, NormConfig


def residual(config: Any) -> str:
    """Where attention and MLP read.

    Returns:
        `sequential`: the MLP reads what attention made; `parallel`: either has its norm; `shared`:
            both read one norm's output.

    Raises:
        CheckpointError: If the settings contradict each other; transformers breaks on those too.
    """
    norms, new = config.num_ln_in_parallel_attn, config.new_decoder_architecture
    if norms is None:
        norms = 2 if new else 1
    if not config.parallel_attn and not new:
        return "sequential"
    if not config.parallel_attn or norms not in (1, 2) or (norms == 2 and not new):
        raise CheckpointError(
            f"config.json combines new_decoder_architecture {new}, parallel_attn "
            f"{config.parallel_attn} and num_ln_in_parallel_attn {norms}; expected one or, in the "
            "new architecture, two norms before parallel branches"
        )
    return "parallel" if norms == 2 else "shared"


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' FalconConfig, read by ours."""
    heads, size = config.num_attention_heads, head_size(config)
    shared = config.num_kv_heads if config.new_decoder_architecture else heads
    if config.multi_query and not config.new_decoder_architecture:
        shared = 1
    return decoder(
        config,
        norm=NormConfig("layer", config.layer_norm_epsilon, bias=True),
        ropes=[] if config.alibi else [rope_config(config, size)],
        attention={
            "key_value_heads": shared,
            "fused": "groups",
            "bias": config.bias,
            "output_bias": config.bias,
            "alibi": AlibiConfig(size**-0.5, bfloat16=True) if config.alibi else None,
        },
        mlp={
            "variant": "plain",
            "size": config.ffn_hidden_size,
            "activation": config.activation,
            "bias": config.bias,
        },
        residual=residual(config),
    )


BLOCK, THEIRS = "layers.blocks", "transformer.h.{layer}"
RULES = (
    Rule("embedding", "transformer.word_embeddings.weight"),
    *linear(f"{BLOCK}.attention.query_key_value", f"{THEIRS}.self_attention.query_key_value"),
    *linear(f"{BLOCK}.attention.output", f"{THEIRS}.self_attention.dense"),
    *linear(f"{BLOCK}.mlp.up", f"{THEIRS}.mlp.dense_h_to_4h"),
    *linear(f"{BLOCK}.mlp.down", f"{THEIRS}.mlp.dense_4h_to_h"),
    *norm("final_norm", "transformer.ln_f"),
    Rule("head", "lm_head.weight", tied_to="embedding"),
)
ONE_BY_ONE = (
    *norm(f"{BLOCK}.attention_norm", f"{THEIRS}.input_layernorm"),
    *norm(f"{BLOCK}.mlp_norm", f"{THEIRS}.post_attention_layernorm"),
)
PARALLEL = (
    *norm(f"{BLOCK}.attention_norm", f"{THEIRS}.ln_attn"),
    *norm(f"{BLOCK}.mlp_norm", f"{THEIRS}.ln_mlp"),
)


def variant(family: Family, config: Any) -> Family:
    """Norms before parallel branches have names of their own."""
    norms = PARALLEL if residual(config) == "parallel" else ONE_BY_ONE
    return replace(family, rules=(*RULES, *norms))


FAMILIES = (
    Family(
        model_type="falcon",
        architecture="FalconForCausalLM",
        base_prefix="transformer",
        config=decoder_config,
        rules=(*RULES, *ONE_BY_ONE),
        variant=variant,
        reads=frozenset({"alibi"}),
        title="Falcon",
        checked="multi-query (7B), grouped with two norms (40B) or one (11B), ALiBi (RW), dynamic "
        "rope",
    ),
)
