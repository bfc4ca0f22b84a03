"""The decoder: embeddings, a scanned stack of blocks, a final norm, and a head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jhessians.capture.shards import Shards, lookup, weight, whole
from jhessians.models.attention import Attention, Layer, Positions, each_layer, positions
from jhessians.models.config import DecoderConfig
from jhessians.models.layers import Linear, Stack, per_feature
from jhessians.models.mlp import MLP
from jhessians.models.moe import MixtureOfExperts
from jhessians.models.norms import apply, norm_if
from jhessians.typing import Array, DTypeLike, Float, Int


class Block(nnx.Module):
    """Attention and MLP around the residual stream, one after the other or side by side."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        before = c.norm_placement != "output"
        after = c.norm_placement in ("output", "both")
        own = c.residual != "shared"
        self.attention_norm = norm_if(before, c.hidden_size, c.norm, dtype)
        self.attention = Attention(c, dtype=dtype, rngs=rngs)
        self.attention_output_norm = norm_if(after, c.hidden_size, c.norm, dtype)
        self.mlp_norm = norm_if(before and own, c.hidden_size, c.norm, dtype)
        self.mlp = (
            MLP(c.hidden_size, c.mlp, dtype=dtype, rngs=rngs)
            if c.experts is None
            else MixtureOfExperts(c, dtype=dtype, rngs=rngs)
        )
        self.mlp_output_norm = norm_if(after, c.hidden_size, c.norm, dtype)
        self.config = c

    def __call__(
        self, h: Float[Array, "n s d"], positions: Positions, *layer: Array
    ) -> Float[Array, "n s d"]:
        """Attention and MLP, each added to the residual stream.

        Args:
            h: Residual stream.
            positions: Of the batch.
            layer: This layer's entries of `Layer`.

        Returns:
            The residual stream after attention and MLP.
        """
        return self.around(h, lambda read: self.attention(read, positions, Layer(*layer)))

    def around(
        self, h: Float[Array, "n s d"], attention: Callable[[Array], Array]
    ) -> Float[Array, "n s d"]:
        """The block around its attention, a function of what the projections read."""
        c = self.config
        if c.norm_placement == "sum":
            h = apply(self.attention_norm, h + attention(h))
            return apply(self.mlp_norm, h + self.mlp(h))
        read = apply(self.attention_norm, h)
        attended = apply(self.attention_output_norm, attention(read))
        if c.residual == "sequential":
            h = h + _scaled(attended, c.residual_scale)
            read = apply(self.mlp_norm, h)
            return h + _scaled(apply(self.mlp_output_norm, self.mlp(read)), c.residual_scale)
        if c.residual == "parallel":
            read = apply(self.mlp_norm, h)
        return h + _scaled(attended + self.mlp(read), c.residual_scale)


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        config: Its shape and parts.
        dtype: Of parameters and activations.
        rngs: For random parameters; `nnx.eval_shape` builds it without any.

    Attributes:
        origin: Where it came from, as whoever made it notes; nothing here looks at it.
    """

    origin: Any = None
    tables = ("embedding", "head")  # spread over devices, they are gathered row by row

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        c = config
        width = c.embedding_size or c.hidden_size
        table, rows = (c.vocabulary_size, width), c.positions + c.position_offset

        def projection(inputs: int, outputs: int) -> Linear | None:
            if c.embedding_size is None:
                return None
            return Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)

        self.embedding = nnx.Param(jax.random.normal(rngs.params(), table, dtype))
        self.position_embedding = (
            nnx.Param(0.1 * jax.random.normal(rngs.params(), (rows, c.hidden_size), dtype))
            if c.learned_positions
            else None
        )
        self.embedding_projection = projection(width, c.hidden_size)
        self.embedding_norm = norm_if(c.embedding_norm, c.hidden_size, c.norm, dtype)
        self.layers = Stack(lambda r: Block(c, dtype=dtype, rngs=r), c.layers, rngs=rngs)
        self.final_norm = norm_if(c.final_norm, c.hidden_size, c.norm, dtype)
        self.output_projection = projection(c.hidden_size, width)
        self.head = (
            None
            if c.tied_embeddings
            else nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), table, dtype))
        )
        self.head_bias = nnx.Param(jnp.zeros(c.vocabulary_size, dtype)) if c.head_bias else None
        self.config = c

    def hidden(
        self, tokens: Int[Array, "n s"], lengths: Int[Array, " n"] | None = None
    ) -> Float[Array, "n s e"]:
        """The normed residual stream, which the head reads.

        Args:
            tokens: Ids, padded on the right.
            lengths: Tokens of each document; default all of them.

        Returns:
            Features of each position, as wide as the head's input.
        """
        c = self.config
        n, s = tokens.shape
        h = self.embed(tokens)
        if lengths is None:
            lengths = jnp.full((n,), s, jnp.int32)
        # A tape knows which derivatives are taken; without one, any may be wanted.
        tape = self.layers.tape
        backward_only = tape is not None and tape.backward_only
        where = positions(c.attention, lengths, s, h.dtype, backward_only=backward_only)
        h = self.layers(h, where, each_layer=tuple(each_layer(c.attention, c.layers)))
        return self.finish(h)

    def embed(
        self, tokens: Int[Array, "n s"], positions: Int[Array, "n s"] | None = None
    ) -> Float[Array, "n s d"]:
        """The residual stream before the first block.

        Args:
            tokens: Ids.
            positions: Where they stand; default from 0 on.

        Returns:
            Scaled and normed where the config says so.
        """
        c = self.config
        h = _scaled(lookup(weight(self.embedding), tokens), c.embedding_scale)
        if self.embedding_projection is not None:
            h = self.embedding_projection(h)
        if self.position_embedding is not None:
            table, first = self.position_embedding[...], c.position_offset
            if positions is None:
                h = h + table[None, first : first + tokens.shape[1]]
            else:
                h = h + table[first + positions]
        return apply(self.embedding_norm, h)

    def finish(self, h: Float[Array, "n s d"]) -> Float[Array, "n s e"]:
        """What the head reads, from the residual stream after the last block."""
        h = apply(self.final_norm, h)
        return h if self.output_projection is None else self.output_projection(h)

    @property
    def table(self) -> Array | Shards:
        """The head's matrix, [token, feature], or this device's part of it."""
        return weight(self.embedding if self.head is None else self.head)

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Unnormalised log-probabilities of the next token."""
        return self.logits_of_products(hidden @ whole(self.table).T)

    def logits_of_products(
        self, products: Float[Array, "*rows v"], tokens: Int[Array, " v"] | None = None
    ) -> Float[Array, "*rows v"]:
        """Logits from products with rows of the head's matrix, entry by entry.

        Args:
            products: With each of these rows.
            tokens: Which rows; default all.

        Returns:
            A logit for each product.
        """
        c, logits = self.config, products
        if self.head_bias is not None:
            bias = self.head_bias[...]
            logits = logits + per_feature(bias if tokens is None else bias[tokens], logits)
        logits = _scaled(logits, c.logit_scale)
        if c.logit_softcap is None:
            return logits
        return c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

    def __call__(
        self, tokens: Int[Array, "n s"], lengths: Int[Array, " n"] | None = None
    ) -> Float[Array, "n s v"]:
        """Logits of every position's next token; the arguments are those of `hidden`."""
        return self.logits(self.hidden(tokens, lengths))


def _scaled(x: Array, factor: float) -> Array:
    return x if factor == 1 else x * factor
