"""What distinguishes one decoder from another, as plain values.

The classes below hold the choices for norms, position embeddings, attention, MLPs and experts, and
`DecoderConfig` combines them. A setting that may differ from layer to layer is a tuple with one
entry per layer; an empty tuple stands for its default.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormConfig:
    """A norm over the last axis.

    Attributes:
        variant: `layer` subtracts the mean, `rms` doesn't.
        epsilon: Added to the variance or mean square.
        scale: Whether the result is multiplied by a learned vector.
        bias: Whether a learned vector is added.
        offset: Added to the stored scale; 1 for families that store the difference from one.
        wide_scale: Whether the result is multiplied by the scale before it is rounded to the
            model's number format, or after.
    """

    variant: Literal["layer", "rms"]
    epsilon: float
    scale: bool = True
    bias: bool = False
    offset: float = 0.0
    wide_scale: bool = True


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its extensions.

    Attributes:
        dimensions: How many of a head's features are rotated, the first ones.
        theta: Base of the wavelengths.
        variant: How frequencies are stretched beyond the context that the model was trained on.
        factor: By how much they are stretched.
        original_positions: The context length it was trained on.
        low_frequency_factor: llama3 only: wavelengths over `original / this` are stretched fully.
        high_frequency_factor: llama3 only: wavelengths under `original / this` are kept.
        beta_fast: yarn only: rotations over the original context above which one is kept.
        beta_slow: yarn only: rotations below which one is stretched fully.
        truncate: yarn only: whether the ramp's ends are rounded to whole features.
        short_factors: longrope only: factor on each wavelength in documents within the original
            context.
        long_factors: longrope only: factor on each wavelength in longer documents.
        scale: Factor on cosine and sine.
        interleaved: Whether the two features that are rotated together are neighbours; otherwise
            they are k and k + dimensions / 2.
    """

    dimensions: int
    theta: float = 10000.0
    variant: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    scale: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class AlibiConfig:
    """Attention with linear biases (Press et al. 2022, arXiv:2108.12409).

    Attributes:
        scale: Factor on the biases.
        bfloat16: Whether they are rounded to bfloat16 whatever the model's number format.
    """

    scale: float = 1.0
    bfloat16: bool = False


@dataclass(frozen=True)
class AttentionConfig:
    """Causal self-attention.

    Attributes:
        heads: Query heads.
        key_value_heads: Heads of keys and values, a divisor of `heads`.
        head_size: Features per head.
        fused: None if query, key and value are three linears; else how one linear's output is
            divided: in `blocks`, all queries before all keys and all values, or in `groups`, the
            queries, key and value of one key-value head before those of the next.
        bias: Whether query, key and value have biases.
        output_bias: Whether the output linear has a bias.
        clip: Bound on the magnitudes of query, key and value, after their norms if there are any.
        qk_norm: Norm of queries and keys before their rotation.
        qk_norm_span: What one norm covers: `head`, the features of one head, with a scale that all
            heads share; `heads`, the same with a scale for each head; or `all`, the features of
            all heads together.
        scales: Multiplies query · key; by default 1 / sqrt(head size) in every layer.
        softcap: c in c · tanh(logit / c).
        windows: How many positions each layer sees, the query's own and those before it; None
            for all.
        ropes: The rotations that layers choose from.
        layer_ropes: Index into `ropes` for each layer, None for no rotation; by default 0.
        alibi: Linear biases, or None.
        sinks: Whether each head has a learned logit that takes part in the softmax and attends to
            nothing (Xiao et al. 2023, arXiv:2309.17453).
    """

    heads: int
    key_value_heads: int
    head_size: int
    fused: Literal["blocks", "groups"] | None = None
    bias: bool = False
    output_bias: bool = False
    clip: float | None = None
    qk_norm: NormConfig | None = None
    qk_norm_span: Literal["head", "heads", "all"] = "head"
    scales: tuple[float, ...] = ()
    softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    ropes: tuple[RopeConfig, ...] = ()
    layer_ropes: tuple[int | None, ...] = ()
    alibi: AlibiConfig | None = None
    sinks: bool = False


@dataclass(frozen=True)
class MLPConfig:
    """The two or three linears after attention.

    Attributes:
        size: Features inside.
        activation: Name of the nonlinearity.
        variant: `plain`, down(activation(up(x))); `gated`, down(activation(gate(x)) · up(x)); or
            gated with gate and up as one linear, whose output is `fused`, all of gate before all
            of up, or `interleaved`, features of gate and up in turn.
        bias: Whether the linears have biases.
        limit: For one linear only: upper bound on gate, and bound on the magnitude of up.
        up_offset: For one linear only: added to up.
    """

    size: int
    activation: str
    variant: Literal["plain", "gated", "fused", "interleaved"] = "gated"
    bias: bool = False
    limit: float | None = None
    up_offset: float = 0.0


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts.

    Attributes:
        count: E.
        chosen: k, how many experts read each token.
        mlp: The MLP that each expert is; its gate and up are one linear.
        router_bias: Whether the router's logits have a bias.
        normalize: Whether the weights of the chosen experts add up to one.
        shared: An MLP that reads all tokens, with a gate of its own; None if there isn't one.
    """

    count: int
    chosen: int
    mlp: MLPConfig
    router_bias: bool = False
    normalize: bool = True
    shared: MLPConfig | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        family: Hugging Face's `model_type`.
        vocabulary_size: V.
        hidden_size: Width of the residual stream.
        layers: L.
        positions: Longest document that it takes, in tokens.
        norm: Every norm over the residual stream.
        attention: The attention of every block.
        mlp: The MLP of every block without experts.
        experts: The experts of every block, instead of `mlp`.
        norm_placement: What is normed: each branch's `input`, its `output`, `both`, or the `sum` of
            stream and branch, as in the original transformer.
        residual: `sequential`, the MLP reads what attention has added to; `parallel`, both read
            the block's input, each through a norm of its own; or `shared`, both through one norm.
        residual_scale: Factor on what attention and MLP add to the stream.
        learned_positions: Whether a learned embedding of the position is added to the token's.
        position_offset: The row of that embedding which position 0 takes.
        embedding_size: Width of the token embedding if it isn't the stream's; one linear then leads
            from the embedding to the stream, and another from the stream to the head.
        embedding_scale: Factor on the token embedding.
        embedding_norm: Whether the stream is normed before the first block.
        final_norm: Whether the stream is normed after the last block.
        tied_embeddings: Whether the head is the token embedding.
        head_bias: Whether logits have a bias.
        logit_scale: Factor on the logits.
        logit_softcap: c in c · tanh(logit / c).
    """

    family: str
    vocabulary_size: int
    hidden_size: int
    layers: int
    positions: int
    norm: NormConfig
    attention: AttentionConfig
    mlp: MLPConfig
    experts: ExpertsConfig | None = None
    norm_placement: Literal["input", "output", "both", "sum"] = "input"
    residual: Literal["sequential", "parallel", "shared"] = "sequential"
    residual_scale: float = 1.0
    learned_positions: bool = False
    position_offset: int = 0
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    final_norm: bool = True
    tied_embeddings: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
