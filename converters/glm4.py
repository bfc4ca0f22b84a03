"""GLM-4-0414 and GLM-Z1."""

from typing import Any

from converters.common import ATTENTION, BLOCK, EMBEDDINGS, LAYER, decoder, head_size, rms
from converters.rope import rope_config
from converters.rules import Family, linear, norm
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' Glm4Config, read by ours."""
    return decoder(
        config,
        norm=rms(config, wide_scale=False),
        ropes=[rope_config(config, head_size(config), partial=True, interleaved=True)],
        attention={"bias": config.attention_bias},
        mlp={"variant": "fused"},
        norm_placement="both",
    )


FAMILIES = (
    Family(
        model_type="glm4",
        architecture="Glm4ForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(
            *EMBEDDINGS,
            *ATTENTION,
            *linear(f"{BLOCK}.mlp.gate_up", f"{LAYER}.mlp.gate_up_proj"),
            *linear(f"{BLOCK}.mlp.down", f"{LAYER}.mlp.down_proj"),
            *norm(f"{BLOCK}.attention_norm", f"{LAYER}.input_layernorm"),
            *norm(f"{BLOCK}.attention_output_norm", f"{LAYER}.post_self_attn_layernorm"),
            *norm(f"{BLOCK}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
            *norm(f"{BLOCK}.mlp_output_norm", f"{LAYER}.post_mlp_layernorm"),
        ),
        title="GLM-4-0414, GLM-Z1",
        checked="four norms, interleaved partial rotation, fused MLP",
    ),
)
