"""What distinguishes one decoder from another, as plain values."""

from dataclasses import dataclass
from typing import Literal


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
        scale: Factor on cosine and sine.
    """

    dimensions: int
    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    scale: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        family: Hugging Face's `model_type`.
        vocabulary_size: V.
        hidden_size: Width of the residual stream.
        layers: L.
        heads: Query heads.
        key_value_heads: Heads of keys and values, a divisor of `heads`.
        head_size: Features per head.
        mlp_size: Features inside the MLP.
        positions: Longest document that it takes, in tokens.
        norm: Kind of every norm.
        norm_epsilon: Added to its variance.
        activation: Name of the MLP's nonlinearity.
        gated_mlp: down(activation(gate(x)) · up(x)) instead of down(activation(up(x))).
        fused_qkv: None if query, key and value are three linears; else how one linear's output
            is divided: by `head` (each head's query, key, value in turn) or in `blocks`.
        attention_bias: Whether query, key and value have biases.
        output_bias: Whether attention's output has one.
        mlp_bias: Whether the MLP's linears have them.
        parallel_residual: Attention and MLP both read the block's input.
        rope: Rotary positions, or None.
        learned_positions: Whether a learned embedding of the position is added to the token's.
        tied_embeddings: The head is the token embedding.
        inverse_layer_scale: Whether layer l divides its attention logits by l + 1 as well.
        scaled_attention: Whether attention logits are divided by the root of the head size.
    """

    family: str
    vocabulary_size: int
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    mlp_size: int
    positions: int
    norm: Literal["layer", "rms"]
    norm_epsilon: float
    activation: str
    gated_mlp: bool
    fused_qkv: Literal["head", "blocks"] | None
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    parallel_residual: bool = False
    rope: RopeConfig | None = None
    learned_positions: bool = False
    tied_embeddings: bool = False
    inverse_layer_scale: bool = False
    scaled_attention: bool = True
