"""Gemma 1, 2 and 3 (text)."""

from typing import Any

from converters.common import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    GATED_MLP,
    INPUT_NORMS,
    LAYER,
    QK_NORM,
    decoder,
    head_size,
    rms,
    windows,
)
from converters.rope import rope_config
from converters.rules import Family, norm
from jhessians.models.config import DecoderConfig


def _gemma(config: Any, attention: dict[str, Any], **changes: Any) -> DecoderConfig:
    """What all three share: norms around 1 + w, and an embedding scaled by its width's root."""
    bias = {"bias": config.attention_bias, "output_bias": config.attention_bias}
    return decoder(
        config,
        norm=rms(config, offset=1.0),
        attention={**bias, **attention},
        embedding_scale=config.hidden_size**0.5,
        **changes,
    )


def gemma(config: Any) -> DecoderConfig:
    """transformers' GemmaConfig, read by ours."""
    return _gemma(config, {}, ropes=[rope_config(config, head_size(config))])


def _newer(config: Any, attention: dict[str, Any], **changes: Any) -> DecoderConfig:
    """What Gemma 2 and 3 share."""
    scales = (config.query_pre_attn_scalar**-0.5,) * config.num_hidden_layers
    return _gemma(
        config,
        {"scales": scales, "windows": windows(config), **attention},
        mlp={"activation": config.hidden_activation},
        norm_placement="both",
        logit_softcap=config.final_logit_softcapping,
        **changes,
    )


def gemma2(config: Any) -> DecoderConfig:
    """transformers' Gemma2Config, read by ours."""
    return _newer(
        config,
        {"softcap": config.attn_logit_softcapping},
        ropes=[rope_config(config, head_size(config))],
    )


def gemma3(config: Any) -> DecoderConfig:
    """transformers' Gemma3TextConfig, read by ours."""
    types = ["full_attention", "sliding_attention"]
    ropes = [rope_config(config, head_size(config), layer_type=each) for each in types]
    return _newer(
        config,
        {
            "qk_norm": rms(config, offset=1.0),
            "layer_ropes": tuple(types.index(each) for each in config.layer_types),
        },
        ropes=ropes,
    )


FOUR_NORMS = (
    *norm(f"{BLOCK}.attention_norm", f"{LAYER}.input_layernorm"),
    *norm(f"{BLOCK}.attention_output_norm", f"{LAYER}.post_attention_layernorm"),
    *norm(f"{BLOCK}.mlp_norm", f"{LAYER}.pre_feedforward_layernorm"),
    *norm(f"{BLOCK}.mlp_output_norm", f"{LAYER}.post_feedforward_layernorm"),
)

FAMILIES = (
    Family(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        base_prefix="model",
        config=gemma,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *GATED_MLP),
        title="Gemma, CodeGemma",
        checked="norms around 1 + w, scaled embedding, wide heads",
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        base_prefix="model",
        config=gemma2,
        rules=(*EMBEDDINGS, *ATTENTION, *GATED_MLP, *FOUR_NORMS),
        reads=frozenset({"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}),
        title="Gemma 2",
        checked="four norms, soft caps, alternating windows",
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        base_prefix="model",
        config=gemma3,
        rules=(*EMBEDDINGS, *ATTENTION, *QK_NORM, *GATED_MLP, *FOUR_NORMS),
        reads=frozenset({"sliding_window", "final_logit_softcapping"}),
        title="Gemma 3 (text)",
        checked="local and global rope, of which one is stretched, normed queries and keys",
    ),
)
