"""Causal self-attention with grouped queries and rotary positions.

h: [document, position, hidden]. Documents are padded on the right, where a causal mask alone
keeps padding from reaching any real position.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jhessians.models.config import DecoderConfig
from jhessians.models.layers import Linear, at_least_float32
from jhessians.models.rope import rotate
from jhessians.typing import Array, DTypeLike, Float


class Attention(nnx.Module):
    """Projections, rotation, softmax, output; fused or separate as the checkpoint has them."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        queries, keys = c.heads * c.head_size, c.key_value_heads * c.head_size

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)

        if c.fused_qkv is None:
            self.query = linear(c.hidden_size, queries, c.attention_bias)
            self.key = linear(c.hidden_size, keys, c.attention_bias)
            self.value = linear(c.hidden_size, keys, c.attention_bias)
        else:
            self.query_key_value = linear(c.hidden_size, queries + 2 * keys, c.attention_bias)
        self.output = linear(queries, c.hidden_size, c.output_bias)
        self.config = c

    def __call__(
        self, h: Float[Array, "n s d"], rope: tuple[Array, ...], logit_scale: Float[Array, ""]
    ) -> Float[Array, "n s d"]:
        """
        Args:
            h: Normed residual stream.
            rope: Cosine and sine of `jhessians.models.rope.rotation`; empty without rope.
            logit_scale: Multiplies query · key.
        """
        query, key, value = self._project(h)
        if rope:
            query, key = rotate(query, *rope), rotate(key, *rope)
        mixed = attend(query, key, value, logit_scale)
        return self.output(mixed.reshape(*h.shape[:2], -1))

    def _project(self, h: Float[Array, "n s d"]) -> tuple[Array, Array, Array]:
        """Query, key and value, each [document, position, head, feature]."""
        c = self.config
        if c.fused_qkv is None:
            parts = [self.query(h), self.key(h), self.value(h)]
        elif c.fused_qkv == "head":
            by_head = self.query_key_value(h).reshape(*h.shape[:2], c.heads, 3, c.head_size)
            parts = [by_head[..., i, :] for i in range(3)]
        else:
            parts = jnp.split(self.query_key_value(h), 3, axis=-1)
        query, key, value = (x.reshape(*h.shape[:2], -1, c.head_size) for x in parts)
        return query, key, value


def attend(
    query: Float[Array, "n s h d"],
    key: Float[Array, "n s k d"],
    value: Float[Array, "n s k d"],
    scale: Float[Array, ""],
) -> Float[Array, "n s h d"]:
    """Causal softmax(scale · query keyᵀ) value; the softmax at least in float32."""
    n, s, heads, d = query.shape
    groups = key.shape[2]
    wide = at_least_float32(query.dtype)
    query = query.reshape(n, s, groups, heads // groups, d)
    logits = jnp.einsum("nsgqd,ntgd->ngqst", query, key).astype(wide) * scale.astype(wide)
    causal = jnp.tril(jnp.ones((s, s), bool))
    logits = jnp.where(causal[None, None, None], logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("ngqst,ntgd->nsgqd", weights, value).reshape(n, s, heads, d)
