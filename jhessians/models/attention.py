"""Causal self-attention with grouped queries, in the variants that `AttentionConfig` names.

h: [document, position, hidden]. Documents are padded on the right, where a causal mask alone
keeps padding from reaching any real position.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jhessians.models.alibi import biases
from jhessians.models.config import AttentionConfig, DecoderConfig
from jhessians.models.layers import Linear
from jhessians.models.norms import Norm
from jhessians.models.rope import rotate, rotations
from jhessians.models.softmax import Terms, attention_at, causal_attention
from jhessians.typing import Array, DTypeLike, Float, Int

EVERYTHING = 2**30
"""A window that no document is longer than."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Positions:
    """What all layers share of where tokens stand; None where the architecture has none.

    Attributes:
        cosine: Of the angles, [rope, document or 1, position, pair]; the last rope rotates nothing.
        sine: Likewise.
        bias: On attention logits, [head, key's position].
        query: Where the one query of each document stands, [document]; None if all positions have
            one.
        backward_only: See `causal_attention`.
    """

    cosine: Float[Array, "p m s r"] | None
    sine: Float[Array, "p m s r"] | None
    bias: Float[Array, "h t"] | None
    query: Int[Array, " n"] | None = None
    backward_only: bool = field(default=False, metadata={"static": True})


class Layer(NamedTuple):
    """What tells one layer's attention from another's; arrays with a layer axis before the scan.

    Attributes:
        scale: Multiplies query · key.
        window: How many positions back the layer sees, its own included.
        rope: Index of its rotation.
    """

    scale: Array
    window: Array
    rope: Array


def positions(
    config: AttentionConfig,
    lengths: Int[Array, " n"],
    size: int,
    dtype: DTypeLike,
    *,
    query: Int[Array, " n"] | None = None,
    backward_only: bool = False,
) -> Positions:
    """Angles and biases of a batch of documents that are padded to `size` positions.

    Args:
        config: Of the attention.
        lengths: Tokens of each document.
        size: S.
        dtype: Of the model.
        query: The one position of each document for which angles are wanted; default all.
        backward_only: See `causal_attention`.

    Returns:
        Angles and biases for all layers; None for what the model doesn't have.
    """
    c = config
    turned = size if query is None else query[:, None]
    cosine, sine = rotations(c.ropes, lengths, turned) if c.ropes else (None, None)
    bias = biases(c.alibi, c.heads, size, dtype) if c.alibi else None
    return Positions(cosine, sine, bias, query, backward_only)


def each_layer(config: AttentionConfig, layers: int) -> Layer:
    """The settings of all layers, [layer]."""
    c = config
    nothing = len(c.ropes)
    ropes = [nothing if i is None else i for i in c.layer_ropes or (0,) * layers]
    windows = [EVERYTHING if w is None else w for w in c.windows or (None,) * layers]
    return Layer(
        # In float64 where JAX has it: a scale rounded to float32 is off by 1e-8 in a float64 run.
        jnp.array(c.scales or (c.head_size**-0.5,) * layers, jnp.result_type(float)),
        jnp.array(windows, jnp.int32),
        jnp.array(ropes, jnp.int32),
    )


class Attention(nnx.Module):
    """Projections, norms, rotation, softmax, output; fused or separate as the checkpoint is."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, hidden = config.attention, config.hidden_size
        queries, keys = c.heads * c.head_size, c.key_value_heads * c.head_size

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)

        if c.fused is None:
            self.query = linear(hidden, queries, c.bias)
            self.key = linear(hidden, keys, c.bias)
            self.value = linear(hidden, keys, c.bias)
        else:
            self.query_key_value = linear(hidden, queries + 2 * keys, c.bias)
        self.output = linear(queries, hidden, c.output_bias)
        self.query_norm = _qk_norm(c, c.heads, dtype)
        self.key_norm = _qk_norm(c, c.key_value_heads, dtype)
        self.sinks = nnx.Param(jnp.zeros(c.heads, dtype)) if c.sinks else None
        self.config = c

    def __call__(
        self, h: Float[Array, "n s d"], positions: Positions, layer: Layer
    ) -> Float[Array, "n s d"]:
        """Attention of every position to itself and those before it.

        Args:
            h: What the projections read.
            positions: Of the batch.
            layer: This layer's settings.

        Returns:
            What is added to the residual stream.
        """
        query, key, value = self.vectors(h, positions, layer)
        return self.output(self.mix(query, key, value, positions, layer))

    def vectors(
        self, h: Float[Array, "n s d"], positions: Positions, layer: Layer
    ) -> tuple[Float[Array, "n s h f"], Float[Array, "n s k f"], Float[Array, "n s k f"]]:
        """Query, key and value as they meet: projected, normed, clipped, rotated."""
        c = self.config
        query, key, value = self._project(h)
        query, key = self._normed(self.query_norm, query), self._normed(self.key_norm, key)
        if c.clip is not None:
            query, key, value = (jnp.clip(x, -c.clip, c.clip) for x in (query, key, value))
        if positions.cosine is not None and positions.sine is not None:
            angles = positions.cosine[layer.rope], positions.sine[layer.rope]
            paired = c.ropes[0].interleaved
            query, key = (rotate(x, *angles, interleaved=paired) for x in (query, key))
        return query, key, value

    def mix(
        self,
        query: Float[Array, "n s h f"],
        key: Float[Array, "n t k f"],
        value: Float[Array, "n t k f"],
        positions: Positions,
        layer: Layer,
    ) -> Float[Array, "n s o"]:
        """What the output projection reads: every query's mean of the values that it sees."""
        mixed = attend(
            query, key, value, layer.scale, layer.window,
            bias=positions.bias, softcap=self.config.softcap,
            sinks=None if self.sinks is None else self.sinks[...],
            position=positions.query, backward_only=positions.backward_only,
        )  # fmt: skip
        return mixed.reshape(*mixed.shape[:2], -1)

    def _project(self, h: Float[Array, "n s d"]) -> tuple[Array, Array, Array]:
        """Query, key and value, each [document, position, head, feature]."""
        c = self.config
        rows = h.shape[:2]
        if c.fused is None:
            parts = [self.query(h), self.key(h), self.value(h)]
        elif c.fused == "blocks":
            ends = [c.heads * c.head_size, (c.heads + c.key_value_heads) * c.head_size]
            parts = jnp.split(self.query_key_value(h), ends, axis=-1)
        else:
            groups = self.query_key_value(h).reshape(*rows, c.key_value_heads, -1, c.head_size)
            parts = [groups[..., :-2, :], groups[..., -2, :], groups[..., -1, :]]
        query, key, value = (x.reshape(*rows, -1, c.head_size) for x in parts)
        return query, key, value

    def _normed(self, norm: Norm | None, x: Float[Array, "n s h d"]) -> Float[Array, "n s h d"]:
        if norm is None:
            return x
        if self.config.qk_norm_span != "all":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def _qk_norm(config: AttentionConfig, heads: int, dtype: DTypeLike) -> Norm | None:
    """The norm of all `heads` queries or keys, if there is one."""
    c = config
    if c.qk_norm is None:
        return None
    features = {
        "head": (c.head_size,),
        "heads": (heads, c.head_size),
        "all": (heads * c.head_size,),
    }[c.qk_norm_span]
    return Norm(features, c.qk_norm, dtype=dtype)


def attend(
    query: Float[Array, "n s h d"],
    key: Float[Array, "n t k d"],
    value: Float[Array, "n t k d"],
    scale: Float[Array, ""],
    window: Int[Array, ""],
    *,
    bias: Float[Array, "h t"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " h"] | None = None,
    position: Int[Array, " n"] | None = None,
    backward_only: bool = False,
) -> Float[Array, "n s h d"]:
    """Causal softmax(scale · query keyᵀ + bias) value; the softmax at least in float32.

    Args:
        query: Of all positions, or of one.
        key: Of all positions.
        value: Of all positions.
        scale: Of the logits.
        window: How many positions back a query sees, its own included.
        bias: Added to the logits.
        softcap: c in c · tanh(logit / c), before bias and mask.
        sinks: A logit of each head that every query sees, and whose value is nothing.
        position: Where the one query of each document stands; default one query for each key.
        backward_only: See `causal_attention`.

    Returns:
        The values' mean for each query and head, weighted by the softmax.
    """
    n, s, heads, d = query.shape
    groups = key.shape[2]

    def by_group(x: Array) -> Array:
        return x.reshape(groups, heads // groups, *x.shape[1:])

    terms = Terms(
        scale,
        window,
        None if bias is None else by_group(bias),
        None if sinks is None else by_group(sinks),
    )
    query = query.reshape(n, s, groups, heads // groups, d).transpose(0, 2, 3, 1, 4)
    key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))
    if position is None:
        mixed = causal_attention(
            query, key, value, terms, softcap=softcap, backward_only=backward_only
        )
    else:
        mixed = attention_at(query, key, value, terms, position, softcap=softcap)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(n, s, heads, d)
