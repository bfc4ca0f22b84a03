"""OPT."""

from typing import Any

from converters.common import decoder
from converters.rules import Family, Rule, linear, norm
from jhessians.models.config import DecoderConfig, NormConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' OPTConfig, read by ours."""
    # OPT-350m differs from its sisters: it norms the sum of stream and branch, and its embedding
    # is narrower than the stream. The table of positions has two rows that no position uses.
    learned, before = config.layer_norm_elementwise_affine, config.do_layer_norm_before
    narrow = config.word_embed_proj_dim != config.hidden_size
    return decoder(
        config,
        norm=NormConfig("layer", 1e-5, scale=learned, bias=learned),
        attention={"bias": config.enable_bias, "output_bias": config.enable_bias},
        mlp={
            "variant": "plain",
            "size": config.ffn_dim,
            "activation": config.activation_function,
            "bias": config.enable_bias,
        },
        norm_placement="input" if before else "sum",
        final_norm=before and not config._remove_final_layer_norm,
        embedding_size=config.word_embed_proj_dim if narrow else None,
        learned_positions=True,
        position_offset=2,
    )


BLOCK, THEIRS = "layers.blocks", "model.decoder.layers.{layer}"

FAMILIES = (
    Family(
        model_type="opt",
        architecture="OPTForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(
            Rule("embedding", "model.decoder.embed_tokens.weight"),
            Rule("position_embedding", "model.decoder.embed_positions.weight"),
            *linear("embedding_projection", "model.decoder.project_in"),
            *norm(f"{BLOCK}.attention_norm", f"{THEIRS}.self_attn_layer_norm"),
            *linear(f"{BLOCK}.attention.query", f"{THEIRS}.self_attn.q_proj"),
            *linear(f"{BLOCK}.attention.key", f"{THEIRS}.self_attn.k_proj"),
            *linear(f"{BLOCK}.attention.value", f"{THEIRS}.self_attn.v_proj"),
            *linear(f"{BLOCK}.attention.output", f"{THEIRS}.self_attn.out_proj"),
            *norm(f"{BLOCK}.mlp_norm", f"{THEIRS}.final_layer_norm"),
            *linear(f"{BLOCK}.mlp.up", f"{THEIRS}.fc1"),
            *linear(f"{BLOCK}.mlp.down", f"{THEIRS}.fc2"),
            *norm("final_norm", "model.decoder.final_layer_norm"),
            *linear("output_projection", "model.decoder.project_out"),
            Rule("head", "lm_head.weight", tied_to="embedding"),
        ),
        title="OPT",
        checked="norms before the branches and after the sums (350m), projected embeddings",
    ),
)
