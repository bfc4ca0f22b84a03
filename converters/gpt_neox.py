"""GPT-NeoX: the Pythia suite, GPT-NeoX-20B, Dolly, ..."""

from typing import Any

from converters.rope import longest_document, rope_config
from converters.rules import Family, Rule, linear, norm
from converters.settings import activation
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' GPTNeoXConfig, read by ours."""
    head_size = config.hidden_size // config.num_attention_heads
    rope = rope_config(config, head_size, partial=True)
    return DecoderConfig(
        family="gpt_neox",
        vocabulary_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_value_heads=config.num_attention_heads,
        head_size=head_size,
        mlp_size=config.intermediate_size,
        positions=longest_document(config, rope),
        norm="layer",
        norm_epsilon=config.layer_norm_eps,
        activation=activation(config.hidden_act),
        gated_mlp=False,
        fused_qkv="head",
        attention_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=True,
        parallel_residual=config.use_parallel_residual,
        rope=rope,
        tied_embeddings=config.tie_word_embeddings,
    )


FAMILY = Family(
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
)
