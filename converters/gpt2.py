"""GPT-2 and what was trained with its code: DistilGPT-2, DialoGPT, Stanford's CRFM models, ..."""

from typing import Any

from converters.common import decoder
from converters.rules import Family, Rule, conv1d, norm
from jhessians.models.config import DecoderConfig, NormConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' GPT2Config, read by ours."""
    # `reorder_and_upcast_attn` needs no counterpart: it moves a factor and widens the softmax,
    # which is at least float32 here in any case.
    scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    by_layer = config.scale_attn_by_inverse_layer_idx
    return decoder(
        config,
        norm=NormConfig("layer", config.layer_norm_epsilon, bias=True),
        attention={
            "fused": "blocks",
            "bias": True,
            "output_bias": True,
            "scales": tuple(scale / (i + 1 if by_layer else 1) for i in range(config.n_layer)),
        },
        mlp={
            "variant": "plain",
            "size": 4 * config.n_embd if config.n_inner is None else config.n_inner,
            "activation": config.activation_function,
            "bias": True,
        },
        learned_positions=True,
    )


FAMILIES = (
    Family(
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
        title="GPT-2, DistilGPT-2",
        checked="Conv1D, scaling by layer, no scaling",
    ),
)
