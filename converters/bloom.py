"""BLOOM and BLOOMZ."""

from typing import Any

from converters.common import decoder
from converters.rules import Family, Rule, linear, norm
from jhessians.models.config import AlibiConfig, DecoderConfig, NormConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' BloomConfig, read by ours."""
    # ALiBi knows no longest document; the checkpoints were trained on `seq_length`, they say.
    return decoder(
        config,
        norm=NormConfig("layer", config.layer_norm_epsilon, bias=True),
        attention={
            "fused": "groups",
            "bias": True,
            "output_bias": True,
            "alibi": AlibiConfig(),
        },
        mlp={
            "variant": "plain",
            "size": 4 * config.hidden_size,
            "activation": "gelu_fast",
            "bias": True,
        },
        positions=getattr(config, "seq_length", None) or 2048,
        embedding_norm=True,
    )


BLOCK, THEIRS = "layers.blocks", "transformer.h.{layer}"

FAMILIES = (
    Family(
        model_type="bloom",
        architecture="BloomForCausalLM",
        base_prefix="transformer",
        config=decoder_config,
        rules=(
            Rule("embedding", "transformer.word_embeddings.weight"),
            *norm("embedding_norm", "transformer.word_embeddings_layernorm"),
            *norm(f"{BLOCK}.attention_norm", f"{THEIRS}.input_layernorm"),
            *linear(
                f"{BLOCK}.attention.query_key_value", f"{THEIRS}.self_attention.query_key_value"
            ),
            *linear(f"{BLOCK}.attention.output", f"{THEIRS}.self_attention.dense"),
            *norm(f"{BLOCK}.mlp_norm", f"{THEIRS}.post_attention_layernorm"),
            *linear(f"{BLOCK}.mlp.up", f"{THEIRS}.mlp.dense_h_to_4h"),
            *linear(f"{BLOCK}.mlp.down", f"{THEIRS}.mlp.dense_4h_to_h"),
            *norm("final_norm", "transformer.ln_f"),
            Rule("head", "lm_head.weight", tied_to="embedding"),
        ),
        title="BLOOM, BLOOMZ",
        checked="ALiBi with a number of heads that is no power of two, normed embedding",
    ),
)
