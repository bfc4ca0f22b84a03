"""GPT-Neo."""

from typing import Any

from converters.common import decoder
from converters.rules import Family, Rule, linear, norm
from jhessians.models.config import DecoderConfig, NormConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' GPTNeoConfig, read by ours. Its attention logits are not scaled."""
    seen = {"global": None, "local": config.window_size}
    return decoder(
        config,
        norm=NormConfig("layer", config.layer_norm_epsilon, bias=True),
        attention={
            "output_bias": True,
            "scales": (1.0,) * config.num_layers,
            "windows": tuple(seen[each] for each in config.attention_layers),
        },
        mlp={
            "variant": "plain",
            "size": config.intermediate_size or 4 * config.hidden_size,
            "activation": config.activation_function,
            "bias": True,
        },
        learned_positions=True,
    )


BLOCK, THEIRS = "layers.blocks", "transformer.h.{layer}"

FAMILIES = (
    Family(
        model_type="gpt_neo",
        architecture="GPTNeoForCausalLM",
        base_prefix="transformer",
        config=decoder_config,
        rules=(
            Rule("embedding", "transformer.wte.weight"),
            Rule("position_embedding", "transformer.wpe.weight"),
            *norm(f"{BLOCK}.attention_norm", f"{THEIRS}.ln_1"),
            *linear(f"{BLOCK}.attention.query", f"{THEIRS}.attn.attention.q_proj"),
            *linear(f"{BLOCK}.attention.key", f"{THEIRS}.attn.attention.k_proj"),
            *linear(f"{BLOCK}.attention.value", f"{THEIRS}.attn.attention.v_proj"),
            *linear(f"{BLOCK}.attention.output", f"{THEIRS}.attn.attention.out_proj"),
            *norm(f"{BLOCK}.mlp_norm", f"{THEIRS}.ln_2"),
            *linear(f"{BLOCK}.mlp.up", f"{THEIRS}.mlp.c_fc"),
            *linear(f"{BLOCK}.mlp.down", f"{THEIRS}.mlp.c_proj"),
            *norm("final_norm", "transformer.ln_f"),
            Rule("head", "lm_head.weight", tied_to="embedding"),
        ),
        ignored=(r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",),
        title="GPT-Neo",
        checked="alternating windows, unscaled attention",
    ),
)
