"""gpt-oss, in plain floating point."""

from typing import Any

from converters.common import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    EXPERTS,
    INPUT_NORMS,
    LAYER,
    decoder,
    experts,
    rms,
    windows,
)
from converters.rope import rope_config
from converters.rules import TRANSPOSE, Family, Rule
from jhessians.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' GptOssConfig, read by ours."""
    # An expert's gate sigmoid(1.702 gate) is bounded, and up is 1 too low; gate and up take turns.
    gated = {
        "activation": "quick_gelu",
        "variant": "interleaved",
        "bias": True,
        "limit": float(config.swiglu_limit),
        "up_offset": 1.0,
    }
    return decoder(
        config,
        norm=rms(config),
        ropes=[rope_config(config, config.head_dim)],
        attention={
            "bias": config.attention_bias,
            "output_bias": config.attention_bias,
            "windows": windows(config),
            "sinks": True,
        },
        experts=experts(config, config.intermediate_size, mlp=gated, router_bias=True),
    )


THEIRS = f"{LAYER}.mlp"

FAMILIES = (
    Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        base_prefix="model",
        config=decoder_config,
        rules=(
            *EMBEDDINGS,
            *INPUT_NORMS,
            *ATTENTION,
            Rule(f"{BLOCK}.attention.sinks", f"{LAYER}.self_attn.sinks"),
            Rule(f"{BLOCK}.mlp.router", f"{THEIRS}.router.weight", TRANSPOSE),
            Rule(f"{BLOCK}.mlp.router_bias", f"{THEIRS}.router.bias"),
            Rule(f"{BLOCK}.mlp.gate_up.kernel", f"{THEIRS}.experts.gate_up_proj"),
            Rule(f"{BLOCK}.mlp.gate_up.bias", f"{THEIRS}.experts.gate_up_proj_bias"),
            Rule(f"{BLOCK}.mlp.down.kernel", f"{THEIRS}.experts.down_proj"),
            Rule(f"{BLOCK}.mlp.down.bias", f"{THEIRS}.experts.down_proj_bias"),
        ),
        modules=EXPERTS,
        reads=frozenset({"sliding_window", "num_local_experts", "num_experts"}),
        title="gpt-oss (bfloat16)",
        checked="mixture of biased experts, attention sinks, windows, yarn",
    ),
)
