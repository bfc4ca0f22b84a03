"""The decoder: embeddings, a scanned stack of blocks, a final norm, and a head."""

import jax
import jax.numpy as jnp
from flax import nnx

from jhessians.models.attention import Attention
from jhessians.models.config import DecoderConfig
from jhessians.models.layers import ACTIVATIONS, LayerNorm, Linear, RMSNorm, Stack
from jhessians.models.rope import rotation
from jhessians.typing import Array, DTypeLike, Float, Int


class MLP(nnx.Module):
    """down(activation(up(x))), or gated by activation(gate(x))."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=c.mlp_bias, dtype=dtype, rngs=rngs)

        self.gate = linear(c.hidden_size, c.mlp_size) if c.gated_mlp else None
        self.up = linear(c.hidden_size, c.mlp_size)
        self.down = linear(c.mlp_size, c.hidden_size)
        self.activation = c.activation

    def __call__(self, h: Float[Array, "n s d"]) -> Float[Array, "n s d"]:
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activate(self.up(h)))
        return self.down(activate(self.gate(h)) * self.up(h))


class Block(nnx.Module):
    """Attention and MLP around the residual stream, one after the other or side by side."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = norm(config, dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm(config, dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.parallel = config.parallel_residual

    def __call__(
        self, h: Float[Array, "n s d"], rope: tuple[Array, ...], logit_scale: Float[Array, ""]
    ) -> Float[Array, "n s d"]:
        attended = self.attention(self.attention_norm(h), rope, logit_scale)
        if self.parallel:
            return h + attended + self.mlp(self.mlp_norm(h))
        h = h + attended
        return h + self.mlp(self.mlp_norm(h))


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        config: Its shape and kind.
        dtype: Of parameters and activations.
        rngs: For random parameters; `nnx.eval_shape` builds it without any.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        c = config
        table = (c.vocabulary_size, c.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), table, dtype))
        self.position_embedding = (
            nnx.Param(0.1 * jax.random.normal(rngs.params(), (c.positions, c.hidden_size), dtype))
            if c.learned_positions
            else None
        )
        self.layers = Stack(lambda r: Block(c, dtype=dtype, rngs=r), c.layers, rngs=rngs)
        self.final_norm = norm(c, dtype)
        self.head = (
            None
            if c.tied_embeddings
            else nnx.Param(c.hidden_size**-0.5 * jax.random.normal(rngs.params(), table, dtype))
        )
        self.config = c

    def hidden(
        self, tokens: Int[Array, "n s"], lengths: Int[Array, " n"] | None = None
    ) -> Float[Array, "n s d"]:
        """The normed residual stream, which the head reads.

        Args:
            tokens: Ids, padded on the right.
            lengths: Tokens of each document; default all of them.
        """
        c = self.config
        n, s = tokens.shape
        h = self.embedding[...][tokens]
        if self.position_embedding is not None:
            h = h + self.position_embedding[...][None, :s]
        if lengths is None:
            lengths = jnp.full((n,), s, jnp.int32)
        rope = rotation(c.rope, lengths, s) if c.rope else ()
        scale = jnp.full((c.layers,), c.head_size**-0.5 if c.scaled_attention else 1.0)
        if c.inverse_layer_scale:
            scale = scale / jnp.arange(1, c.layers + 1, dtype=scale.dtype)
        h = self.layers(h, rope, each_layer=(scale,))
        return self.final_norm(h)

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Unnormalised log-probabilities of the next token."""
        return hidden @ (self.embedding if self.head is None else self.head)[...].T

    def __call__(
        self, tokens: Int[Array, "n s"], lengths: Int[Array, " n"] | None = None
    ) -> Float[Array, "n s v"]:
        return self.logits(self.hidden(tokens, lengths))


def norm(config: DecoderConfig, dtype: DTypeLike) -> LayerNorm | RMSNorm:
    """The family's kind of norm over the residual stream."""
    kind: type[LayerNorm] | type[RMSNorm] = LayerNorm if config.norm == "layer" else RMSNorm
    return kind(config.hidden_size, epsilon=config.norm_epsilon, dtype=dtype)
