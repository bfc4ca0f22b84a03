"""What distinguishes one decoder from another, as plain values.

Every choice is a value of one of the parts below: how norms compute and where they stand, how
attention projects, sees positions and limits its sight, what the MLP is. A setting that may differ
from layer to layer is a tuple with one entry per layer; an empty tuple stands for its default.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormConfig:
    """A norm over the last axis.

    Attributes:
        kind: `layer` subtracts the mean, `rms` doesn't.
        epsilon: Added to the variance or mean square.
        scale: Whether the result is multiplied by a learned vector.
        bias: Whether a learned vector is added.
        offset: Added to the stored scale: 1 where weights scatter around zero.
        wide_scale: Whether the product with the scale comes before the rounding to the model's
            dtype, or after it.
    """

    kind: Literal["layer", "rms"]
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
        kind: How frequencies are stretched beyond the context that the model was trained on.
        factor: By how much.
        original_positions: The context length it was trained on.
        low_frequency_factor: llama3 only: wavelengths over `original / this` are stretched fully.
        high_frequency_factor: llama3 only: wavelengths under `original / this` are kept.
        beta_fast: yarn only: rotations over the original context above which one is kept.
        beta_slow: yarn only: rotations below which one is stretched fully.
        truncate: yarn only: whether the ramp's ends are rounded to whole features.
        short_factors: longrope only: of each wavelength, for documents within the original context.
        long_factors: longrope only: for longer ones.
        scale: Factor on cosine and sine.
        interleaved: Whether a pair is two neighbours, or k and k + dimensions / 2.
    """

    dimensions: int
    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
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
        bfloat16: Whether they are rounded to bfloat16 whatever the model's dtype.
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
            divided: in `blocks` (all queries, all keys, all values), or in `groups` (for every
            key-value head its queries, its key, its value).
        bias: Whether query, key and value have biases.
        output_bias: Whether the output has one.
        clip: Bound on the magnitudes of query, key and value, normed if they are.
        qk_norm: Norm of queries and keys before their rotation.
        qk_norm_span: What is normed at once and has a scale: a `head`, all heads with one scale;
            `heads`, each with its own; or `all` features together.
        scales: Multiplies query · key; by default 1 / sqrt(head size) in every layer.
        softcap: c in c · tanh(logit / c).
        windows: How many positions back a layer sees, its own included; None for all.
        ropes: The rotations that layers choose from.
        layer_ropes: Which one each layer takes, None for none; by default the first one.
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
        kind: `plain`, down(activation(up(x))); `gated`, down(activation(gate(x)) · up(x)); or gated
            with gate and up as one linear: `fused`, all of gate and then all of up; `interleaved`,
            turn by turn.
        bias: Whether the linears have biases.
        limit: Fused only: bound on gate from above and on the magnitude of up.
        up_offset: Fused only: added to up.
    """

    size: int
    activation: str
    kind: Literal["plain", "gated", "fused", "interleaved"] = "gated"
    bias: bool = False
    limit: float | None = None
    up_offset: float = 0.0


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts.

    Attributes:
        count: E.
        chosen: k, how many of them read a token.
        mlp: Of each expert; gate and up are one linear.
        router_bias: Whether the router's logits have a bias.
        normalize: Whether the weights of the chosen experts add up to one.
        shared: An MLP for all tokens, behind a gate of its own; None if there isn't one.
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
        attention: Of every block.
        mlp: Of every block without experts.
        experts: Of every block, instead of `mlp`.
        norm_placement: What is normed: each branch's `input`, its `output`, `both`, or the `sum` of
            stream and branch, as in the original transformer.
        residual: Attention and MLP `sequential`, or `parallel`: both read the block's input, each
            normed on its own; `shared` is parallel behind one norm.
        residual_scale: Factor on what a branch adds to the stream.
        learned_positions: Whether a learned embedding of the position is added to the token's.
        position_offset: Row of that table at which position 0 is.
        embedding_size: Width of the token embedding where it isn't the stream's: linears then lead
            from one to the other and back.
        embedding_scale: Factor on the token embedding.
        embedding_norm: Whether the stream is normed before the first block.
        final_norm: Whether it is normed after the last one.
        tied_embeddings: The head is the token embedding.
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
