"""What many families share: settings that configs name alike, and groups of rules.

Most decoders took Llama's names for their modules and settings. A family names here what it has in
common with those, and spells out the rest.
"""

from collections.abc import Sequence
from typing import Any

from converters.rules import TRANSPOSE, Rule, linear, norm
from converters.settings import activation
from jhessians.errors import CheckpointError
from jhessians.models.config import (
    AttentionConfig,
    DecoderConfig,
    ExpertsConfig,
    MLPConfig,
    NormConfig,
    RopeConfig,
)

BLOCK = "layers.blocks"
LAYER = "model.layers.{layer}"

EMBEDDINGS = (
    Rule("embedding", "model.embed_tokens.weight"),
    *norm("final_norm", "model.norm"),
    Rule("head", "lm_head.weight", tied_to="embedding"),
)
ATTENTION = (
    *linear(f"{BLOCK}.attention.query", f"{LAYER}.self_attn.q_proj"),
    *linear(f"{BLOCK}.attention.key", f"{LAYER}.self_attn.k_proj"),
    *linear(f"{BLOCK}.attention.value", f"{LAYER}.self_attn.v_proj"),
    *linear(f"{BLOCK}.attention.output", f"{LAYER}.self_attn.o_proj"),
)
QK_NORM = (
    *norm(f"{BLOCK}.attention.query_norm", f"{LAYER}.self_attn.q_norm"),
    *norm(f"{BLOCK}.attention.key_norm", f"{LAYER}.self_attn.k_norm"),
)
GATED_MLP = (
    *linear(f"{BLOCK}.mlp.gate", f"{LAYER}.mlp.gate_proj"),
    *linear(f"{BLOCK}.mlp.up", f"{LAYER}.mlp.up_proj"),
    *linear(f"{BLOCK}.mlp.down", f"{LAYER}.mlp.down_proj"),
)
INPUT_NORMS = (
    *norm(f"{BLOCK}.attention_norm", f"{LAYER}.input_layernorm"),
    *norm(f"{BLOCK}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
)
EXPERTS = (
    (f"{BLOCK}.mlp.gate_up", "layers.{layer}.mlp.experts.expert_{expert}.gate_up_proj"),
    (f"{BLOCK}.mlp.down", "layers.{layer}.mlp.experts.expert_{expert}.down_proj"),
)
"""What torch bergson calls the linears of experts, which are no modules of transformers'."""
ROTARY_BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def head_size(config: Any) -> int:
    """Features per head: the config's own number, or the hidden size divided among the heads."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def rms(config: Any, **changes: Any) -> NormConfig:
    """Root-mean-square norms with the config's epsilon."""
    return NormConfig("rms", **{"epsilon": config.rms_norm_eps, **changes})


def decoder(
    config: Any,
    *,
    norm: NormConfig,
    ropes: Sequence[RopeConfig] = (),
    attention: dict[str, Any] | None = None,
    mlp: dict[str, Any] | None = None,
    **changes: Any,
) -> DecoderConfig:
    """Our config from one whose settings have Llama's names.

    Args:
        config: transformers' config.
        norm: Of the residual stream.
        ropes: The rotations that layers choose from.
        attention: Fields of `AttentionConfig` beside the heads' sizes and numbers.
        mlp: Fields of `MLPConfig`; by default gated and with the config's activation.
        changes: Further fields of `DecoderConfig`.

    Returns:
        Llama's decoder but for what the arguments change.

    Raises:
        CheckpointError: If the decoder doesn't have the activation.
    """
    mlp = {"size": None, "activation": None, **(mlp or {})}
    heads = config.num_attention_heads
    sizes = {
        "heads": heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_size": head_size(config),
    }
    stretched = [int(rope.original_positions * rope.factor) for rope in ropes]
    fields = {
        "vocabulary_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "tied_embeddings": config.tie_word_embeddings,
    }
    if "positions" not in changes:
        fields["positions"] = max([config.max_position_embeddings, *stretched])
    return DecoderConfig(
        family=config.model_type,
        norm=norm,
        attention=AttentionConfig(**{**sizes, "ropes": tuple(ropes), **(attention or {})}),
        mlp=MLPConfig(
            **{
                **mlp,
                "size": mlp["size"] or config.intermediate_size,
                "activation": activation(mlp["activation"] or config.hidden_act),
            }
        ),
        **{**fields, **changes},
    )


def each_expert(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Kernels of experts that a checkpoint holds one by one; ours has gate and up side by side."""
    expert = f"{LAYER}.{block}.experts.{{expert}}"
    gate_up = f"{BLOCK}.mlp.gate_up.kernel"
    return (
        Rule(gate_up, f"{expert}.{gate}.weight", TRANSPOSE, part=(0, 2)),
        Rule(gate_up, f"{expert}.{up}.weight", TRANSPOSE, part=(1, 2)),
        Rule(f"{BLOCK}.mlp.down.kernel", f"{expert}.{down}.weight", TRANSPOSE),
    )


def experts(
    config: Any, size: int, *, mlp: dict[str, Any] | None = None, **changes: Any
) -> ExpertsConfig:
    """A mixture of experts whose settings have the usual names.

    Args:
        config: transformers' config.
        size: Features inside an expert.
        mlp: Further fields of the experts' `MLPConfig`.
        changes: Further fields of `ExpertsConfig`.

    Returns:
        The experts' number, how many of them a token takes, and their MLP.

    Raises:
        CheckpointError: If the decoder doesn't have the activation, or a token takes more experts
            than there are.
    """
    count = getattr(config, "num_experts", None) or config.num_local_experts
    chosen = config.num_experts_per_tok
    if not 1 <= chosen <= count:
        raise CheckpointError(
            f"config.json sends a token to {chosen} of {count} experts; expected 1 to {count}"
        )
    fields = {"activation": activation(config.hidden_act), "variant": "fused", **(mlp or {})}
    return ExpertsConfig(count, chosen, MLPConfig(size, **fields), **changes)


def same_window(config: Any) -> tuple[int | None, ...]:
    """One window for all layers, if the config has one."""
    return (
        () if config.sliding_window is None else (config.sliding_window,) * config.num_hidden_layers
    )


def windows(config: Any) -> tuple[int | None, ...]:
    """The layers' windows, as `layer_types` has them; empty if no layer has one.

    Returns:
        Per layer how many positions back a query sees; None where it sees all.

    Raises:
        CheckpointError: If a layer is of another type, or its window isn't given.
    """
    size, count = getattr(config, "sliding_window", None), config.num_hidden_layers
    types = config.layer_types
    if len(types) != count:
        raise CheckpointError(
            f"config.json gives {len(types)} layer_types; expected {count}, one per layer"
        )
    known = {"full_attention": None, "sliding_attention": size}
    for each in types:
        if each not in known:
            raise CheckpointError(
                f"config.json has a layer of type {each!r}; expected {' or '.join(known)}"
            )
    if size is None and "sliding_attention" in types:
        raise CheckpointError(
            "config.json has layers of type 'sliding_attention', but no sliding_window; "
            "expected its size in tokens"
        )
    return tuple(known[each] for each in types) if size is not None else ()
