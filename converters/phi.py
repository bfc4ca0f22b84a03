"""Phi-1, Phi-1.5 and Phi-2."""

from typing import Any

from converters.common import BLOCK, LAYER, decoder, head_size
from converters.rope import rope_config
from converters.rules import Family, Rule, linear, norm
from jhessians.models.config import DecoderConfig, NormConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' PhiConfig, read by ours."""
    layer_norm = NormConfig("layer", config.layer_norm_eps, bias=True)
    return decoder(
        config,
        norm=layer_norm,
        ropes=[rope_config(config, head_size(config), partial=True)],
        attention={
            "bias": True,
            "output_bias": True,
            "qk_norm": layer_norm if config.qk_layernorm else None,
        },
        mlp={"variant": "plain", "bias": True},
        residual="shared",
        head_bias=True,
    )


FAMILIES = (
    Family(
        model_type="phi",
        architecture="PhiForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(
            Rule("embedding", "model.embed_tokens.weight"),
            *norm(f"{BLOCK}.attention_norm", f"{LAYER}.input_layernorm"),
            *linear(f"{BLOCK}.attention.query", f"{LAYER}.self_attn.q_proj"),
            *linear(f"{BLOCK}.attention.key", f"{LAYER}.self_attn.k_proj"),
            *linear(f"{BLOCK}.attention.value", f"{LAYER}.self_attn.v_proj"),
            *linear(f"{BLOCK}.attention.output", f"{LAYER}.self_attn.dense"),
            *norm(f"{BLOCK}.attention.query_norm", f"{LAYER}.self_attn.q_layernorm"),
            *norm(f"{BLOCK}.attention.key_norm", f"{LAYER}.self_attn.k_layernorm"),
            *linear(f"{BLOCK}.mlp.up", f"{LAYER}.mlp.fc1"),
            *linear(f"{BLOCK}.mlp.down", f"{LAYER}.mlp.fc2"),
            *norm("final_norm", "model.final_layernorm"),
            Rule("head", "lm_head.weight", tied_to="embedding"),
            Rule("head_bias", "lm_head.bias"),
        ),
        reads=frozenset({"qk_layernorm"}),
        title="Phi-1, Phi-1.5, Phi-2",
        checked="parallel residual behind one norm, partial rotation, normed queries and keys",
    ),
)
