"""GPT-2 and what was trained with its code: DistilGPT-2, DialoGPT, Stanford's CRFM models, ..."""

from typing import Any

from converters.rules import Family, Rule, conv1d, norm
from converters.settings import activation
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' GPT2Config, read by ours.

    `reorder_and_upcast_attn` needs no counterpart: it moves a factor and widens the softmax, which
    is at least float32 here in any case.
    """
    return DecoderConfig(
        family="gpt2",
        vocabulary_size=config.vocab_size,
        hidden_size=config.n_embd,
        layers=config.n_layer,
        heads=config.n_head,
        key_value_heads=config.n_head,
        head_size=config.n_embd // config.n_head,
        mlp_size=4 * config.n_embd if config.n_inner is None else config.n_inner,
        positions=config.n_positions,
        norm="layer",
        norm_epsilon=config.layer_norm_epsilon,
        activation=activation(config.activation_function),
        gated_mlp=False,
        fused_qkv="blocks",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        learned_positions=True,
        tied_embeddings=config.tie_word_embeddings,
        inverse_layer_scale=config.scale_attn_by_inverse_layer_idx,
        scaled_attention=config.scale_attn_weights,
    )


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    base_prefix="transformer",
    config=decoder_config,
    rules=(
        Rule("embedding", "transformer.wte.weight"),
        Rule("position_embedding", "transformer.wpe.weight"),
        *norm("layers.blocks.attention_norm", "transformer.h.{layer}.ln_1"),
        *conv1d("layers.blocks.attention.query_key_value", "transformer.h.{layer}.attn.c_attn"),
        *conv1d("layers.blocks.attention.output", "transformer.h.{layer}.attn.c_proj"),
        *norm("layers.blocks.mlp_norm", "transformer.h.{layer}.ln_2"),
        *conv1d("layers.blocks.mlp.up", "transformer.h.{layer}.mlp.c_fc"),
        *conv1d("layers.blocks.mlp.down", "transformer.h.{layer}.mlp.c_proj"),
        *norm("final_norm", "transformer.ln_f"),
        Rule("head", "lm_head.weight", tied_to="embedding"),
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
