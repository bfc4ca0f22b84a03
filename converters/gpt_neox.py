"""GPT-NeoX: the Pythia suite, GPT-NeoX-20B, Dolly, ..."""

from typing import Any

from converters.common import decoder, head_size
from converters.rope import rope_config
from converters.rules import Family, Rule, linear, norm
from jhessians.models.config import DecoderConfig, NormConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' GPTNeoXConfig, read by ours."""
    return decoder(
        config,
        norm=NormConfig("layer", config.layer_norm_eps, bias=True),
        ropes=[rope_config(config, head_size(config), partial=True)],
        attention={
            "fused": "groups",
            "bias": config.attention_bias,
            "output_bias": config.attention_bias,
        },
        mlp={"variant": "plain", "bias": True},
        residual="parallel" if config.use_parallel_residual else "sequential",
    )


FAMILIES = (
    Family(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        base_prefix="gpt_neox",
        config=decoder_config,
        rules=(
            Rule("embedding", "gpt_neox.embed_in.weight"),
            *norm("layers.blocks.attention_norm", "gpt_neox.layers.{layer}.input_layernorm"),
            *linear(
                "layers.blocks.attention.query_key_value",
                "gpt_neox.layers.{layer}.attention.query_key_value",
            ),
            *linear("layers.blocks.attention.output", "gpt_neox.layers.{layer}.attention.dense"),
            *norm("layers.blocks.mlp_norm", "gpt_neox.layers.{layer}.post_attention_layernorm"),
            *linear("layers.blocks.mlp.up", "gpt_neox.layers.{layer}.mlp.dense_h_to_4h"),
            *linear("layers.blocks.mlp.down", "gpt_neox.layers.{layer}.mlp.dense_4h_to_h"),
            *norm("final_norm", "gpt_neox.final_layer_norm"),
            Rule("head", "embed_out.weight", tied_to="embedding"),
        ),
        renamed=((r"^lm_head\.", "embed_out."),),  # a state dict of transformers 5
        ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
        title="GPT-NeoX, Pythia",
        checked="parallel and sequential residuals, partial rotation, dynamic rope",
    ),
)
