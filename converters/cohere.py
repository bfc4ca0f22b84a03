"""Command R, R+, R7B, A, and Aya."""

from typing import Any

from converters.common import (
    ATTENTION,
    EMBEDDINGS,
    GATED_MLP,
    INPUT_NORMS,
    QK_NORM,
    decoder,
    head_size,
    windows,
)
from converters.rope import rope_config
from converters.rules import Family
from jhessians.models.config import DecoderConfig, NormConfig


def _cohere(config: Any, attention: dict[str, Any]) -> DecoderConfig:
    """What both share: neighbours rotated, branches side by side behind one norm."""
    return decoder(
        config,
        norm=NormConfig("layer", config.layer_norm_eps),
        ropes=[rope_config(config, head_size(config), interleaved=True)],
        attention={
            "bias": config.attention_bias,
            "output_bias": config.attention_bias,
            **attention,
        },
        residual="shared",
        logit_scale=config.logit_scale,
    )


def cohere(config: Any) -> DecoderConfig:
    """transformers' CohereConfig, read by ours."""
    per_head = NormConfig("layer", config.layer_norm_eps) if config.use_qk_norm else None
    return _cohere(config, {"qk_norm": per_head, "qk_norm_span": "heads"})


def cohere2(config: Any) -> DecoderConfig:
    """transformers' Cohere2Config, read by ours: only layers with a window rotate."""
    sizes = windows(config) or (None,) * config.num_hidden_layers
    ropes = tuple(None if size is None else 0 for size in sizes)
    return _cohere(config, {"windows": sizes, "layer_ropes": ropes})


FAMILIES = (
    Family(
        model_type="cohere",
        architecture="CohereForCausalLM",
        base_prefix="model",
        config=cohere,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *QK_NORM, *GATED_MLP),
        reads=frozenset({"logit_scale", "use_qk_norm"}),
        title="Command R, Command R+, Aya 23",
        checked="parallel residual behind one norm, interleaved rotation, scaled logits, a norm "
        "per head",
    ),
    Family(
        model_type="cohere2",
        architecture="Cohere2ForCausalLM",
        base_prefix="model",
        config=cohere2,
        rules=(*EMBEDDINGS, *INPUT_NORMS, *ATTENTION, *GATED_MLP),
        reads=frozenset({"logit_scale", "sliding_window"}),
        title="Command R7B, Command A",
        checked="rotation only in layers with a window",
    ),
)
