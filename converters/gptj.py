"""GPT-J 6B."""

from typing import Any

from converters.common import decoder, head_size
from converters.rules import Family, Rule, linear, norm
from jhessians.errors import CheckpointError
from jhessians.models.config import DecoderConfig, NormConfig, RopeConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' GPTJConfig, read by ours."""
    rotated = config.rotary_dim
    if not rotated or rotated % 2 or rotated > head_size(config):
        raise CheckpointError(
            f"config.json rotates rotary_dim {rotated!r} of {head_size(config)} features per head; "
            "expected an even number of them"
        )
    return decoder(
        config,
        norm=NormConfig("layer", config.layer_norm_epsilon, bias=True),
        ropes=[RopeConfig(rotated, interleaved=True)],
        mlp={
            "variant": "plain",
            "size": 4 * config.n_embd if config.n_inner is None else config.n_inner,
            "activation": config.activation_function,
            "bias": True,
        },
        residual="shared",
        head_bias=True,
    )


BLOCK, THEIRS = "layers.blocks", "transformer.h.{layer}"

FAMILIES = (
    Family(
        model_type="gptj",
        architecture="GPTJForCausalLM",
        base_prefix="transformer",
        config=decoder_config,
        rules=(
            Rule("embedding", "transformer.wte.weight"),
            *norm(f"{BLOCK}.attention_norm", f"{THEIRS}.ln_1"),
            *linear(f"{BLOCK}.attention.query", f"{THEIRS}.attn.q_proj"),
            *linear(f"{BLOCK}.attention.key", f"{THEIRS}.attn.k_proj"),
            *linear(f"{BLOCK}.attention.value", f"{THEIRS}.attn.v_proj"),
            *linear(f"{BLOCK}.attention.output", f"{THEIRS}.attn.out_proj"),
            *linear(f"{BLOCK}.mlp.up", f"{THEIRS}.mlp.fc_in"),
            *linear(f"{BLOCK}.mlp.down", f"{THEIRS}.mlp.fc_out"),
            *norm("final_norm", "transformer.ln_f"),
            Rule("head", "lm_head.weight", tied_to="embedding"),
            Rule("head_bias", "lm_head.bias"),
        ),
        ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
        title="GPT-J",
        checked="parallel residual behind one norm, interleaved partial rotation, head with a bias",
    ),
)
