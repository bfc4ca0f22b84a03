"""Llama 2 and 3, and what was made in their likeness: SmolLM2, TinyLlama, Vicuna, ..."""

from typing import Any

from converters.rope import longest_document, rope_config
from converters.rules import Family, Rule, linear, norm
from converters.settings import activation
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' LlamaConfig, read by ours."""
    rope = rope_config(config, config.head_dim)
    return DecoderConfig(
        family="llama",
        vocabulary_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        mlp_size=config.intermediate_size,
        positions=longest_document(config, rope),
        norm="rms",
        norm_epsilon=config.rms_norm_eps,
        activation=activation(config.hidden_act),
        gated_mlp=True,
        fused_qkv=None,
        attention_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        rope=rope,
        tied_embeddings=config.tie_word_embeddings,
    )


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    base_prefix="model",
    config=decoder_config,
    rules=(
        Rule("embedding", "model.embed_tokens.weight"),
        *norm("layers.blocks.attention_norm", "model.layers.{layer}.input_layernorm"),
        *linear("layers.blocks.attention.query", "model.layers.{layer}.self_attn.q_proj"),
        *linear("layers.blocks.attention.key", "model.layers.{layer}.self_attn.k_proj"),
        *linear("layers.blocks.attention.value", "model.layers.{layer}.self_attn.v_proj"),
        *linear("layers.blocks.attention.output", "model.layers.{layer}.self_attn.o_proj"),
        *norm("layers.blocks.mlp_norm", "model.layers.{layer}.post_attention_layernorm"),
        *linear("layers.blocks.mlp.gate", "model.layers.{layer}.mlp.gate_proj"),
        *linear("layers.blocks.mlp.up", "model.layers.{layer}.mlp.up_proj"),
        *linear("layers.blocks.mlp.down", "model.layers.{layer}.mlp.down_proj"),
        *norm("final_norm", "model.norm"),
        Rule("head", "lm_head.weight", tied_to="embedding"),
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
