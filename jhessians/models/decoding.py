"""Tokens after a prompt, one at a time, with a cache of keys and values.

The prompts pass through the model together and fill the cache. Every further token then passes
alone: in each layer it meets the keys and values of the tokens before it. A document stands in the
cache from position 0 on, so documents of different lengths need no padding between prompt and
answer.

Where a rotation depends on the document's length (rope kinds `dynamic` and `longrope`), a document
that grows past the original context turns differently at all of its positions, and what the layers
made of them changes. The cache is then filled anew, so that each token is the one that a whole
forward pass over the document so far would give.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jhessians.models.attention import Attention, Layer, Positions, each_layer, positions
from jhessians.models.decoder import Block, Decoder
from jhessians.models.layers import at_least_float32
from jhessians.models.rope import depends_on_length, turns_differently
from jhessians.typing import Array, Bool, Float, Int, PyTree


class Cache(NamedTuple):
    """What attention has read so far; without the layer axis, one layer's part of it.

    Attributes:
        key: Normed, clipped and rotated; zero or stale where no token stands yet.
        value: Likewise.
    """

    key: Float[Array, "*layer n t k d"]
    value: Float[Array, "*layer n t k d"]


class Sampling(NamedTuple):
    """How tokens are drawn from softmax(logits / temperature).

    Attributes:
        temperature: Positive.
        key: Of the random numbers. A draw depends on it, the document and the step alone.
        document: Each document's number.
    """

    temperature: Float[Array, ""]
    key: PyTree[Array]
    document: Int[Array, " n"]


def prefill(
    model: Decoder, tokens: Int[Array, "n s"], lengths: Int[Array, " n"], size: int
) -> tuple[Float[Array, "n d"], Cache]:
    """Read prompts, all their tokens at once.

    Args:
        model: The decoder.
        tokens: Padded on the right.
        lengths: Tokens of each document.
        size: T, the positions that the cache shall have.

    Returns:
        What the head reads at each document's last token, and the cache.
    """
    s = tokens.shape[1]
    h = model.embed(tokens)
    where = positions(model.config.attention, lengths, s, h.dtype)
    h, entries = _through_layers(model, h, where, None)
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)
    room = ((0, 0), (0, 0), (0, size - s), (0, 0), (0, 0))
    return model.finish(last)[:, 0], Cache(*(jnp.pad(x, room) for x in entries))


def step(
    model: Decoder, token: Int[Array, " n"], position: Int[Array, " n"], cache: Cache
) -> tuple[Float[Array, "n d"], Cache]:
    """Read one more token of each document.

    Args:
        model: The decoder.
        token: Of each document.
        position: Where it stands: how many tokens are before it.
        cache: Of those.

    Returns:
        What the head reads at the token, and the cache with the token in it.
    """
    h = model.embed(token[:, None], position[:, None])
    size = cache.key.shape[2]
    where = positions(model.config.attention, position + 1, size, h.dtype, query=position)
    h, entries = _through_layers(model, h, where, cache)
    document = jnp.arange(len(token))
    new = (x.at[:, document, position].set(e[:, :, 0]) for x, e in zip(cache, entries, strict=True))
    return model.finish(h)[:, 0], Cache(*new)


def _through_layers(
    model: Decoder, h: Float[Array, "n s d"], where: Positions, cache: Cache | None
) -> tuple[Float[Array, "n s d"], Cache]:
    """The residual stream after the last block, and the tokens' own keys and values."""
    graph, state = nnx.split(model.layers.blocks)

    def body(h: Array, layer: tuple[PyTree[Array], Layer, Cache | None]) -> tuple[Array, Cache]:
        state, settings, past = layer
        block = nnx.merge(graph, state)
        assert isinstance(block, Block)
        entries = []

        def attention(read: Array) -> Array:
            output, entry = _attend(block.attention, read, where, settings, past)
            entries.append(entry)
            return output

        h = block.around(h, attention)
        return h, entries[0]

    settings = each_layer(model.config.attention, model.config.layers)
    return lax.scan(body, h, (state, settings, cache))


def _attend(
    attention: Attention,
    read: Float[Array, "n s d"],
    where: Positions,
    layer: Layer,
    past: Cache | None,
) -> tuple[Float[Array, "n s d"], Cache]:
    """Attention of tokens to themselves, and to the past if there is one; and their entries."""
    query, key, value = attention.vectors(read, where, layer)
    entry = Cache(key, value)
    if past is not None and where.query is not None:
        size = past.key.shape[1]
        own = jnp.arange(size, dtype=jnp.int32)[None] == where.query[:, None]
        key, value = (
            jnp.where(own[:, :, None, None], new, old) for new, old in zip(entry, past, strict=True)
        )
    return attention.output(attention.mix(query, key, value, where, layer)), entry


def choose(
    logits: Float[Array, "n v"], number: Int[Array, ""] | int, sampling: Sampling | None
) -> Int[Array, " n"]:
    """Each document's next token: the likeliest one, or one that is drawn.

    A draw is the Gumbel-max trick, argmax(logits + temperature · noise), the noise in float32
    whatever the model's dtype.

    Args:
        logits: Of each document.
        number: Which of the new tokens it is.
        sampling: How to draw; None for the likeliest.

    Returns:
        Token ids, from 0 to v - 1.
    """
    wide = logits.astype(at_least_float32(logits.dtype))
    if sampling is None:
        return jnp.argmax(wide, axis=-1).astype(jnp.int32)

    def noise(document: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(sampling.key, document), number)
        return jax.random.gumbel(key, wide.shape[-1:], jnp.float32, mode="high")

    scaled = sampling.temperature * jax.vmap(noise)(sampling.document)
    return jnp.argmax(wide + scaled.astype(wide.dtype), axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("graph", "new_tokens"))
def decode(
    graph: nnx.GraphDef,
    state: PyTree[Array],
    tokens: Int[Array, "n s"],
    lengths: Int[Array, " n"],
    ends: Int[Array, " e"],
    sampling: Sampling | None,
    *,
    new_tokens: int,
) -> Int[Array, "n m"]:
    """The tokens that follow the prompts.

    Args:
        graph: The decoder's structure, from `nnx.split`.
        state: Its parameters, from the same.
        tokens: Prompts, padded on the right.
        lengths: Tokens of each, at least one.
        ends: Tokens after which a document is complete; it repeats the one that ended it.
        sampling: How to draw; None for the likeliest tokens.
        new_tokens: M, how many.

    Returns:
        Token ids; rows that end early are filled with the token that ended them.
    """
    model: Decoder = nnx.merge(graph, state)
    ropes = model.config.attention.ropes
    n, s = tokens.shape
    size = s + new_tokens
    document, new = jnp.arange(n), jnp.arange(new_tokens, dtype=jnp.int32)

    def is_end(token: Int[Array, " n"]) -> Bool[Array, " n"]:
        return (token[:, None] == ends[None]).any(1)

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        count, token, *_ = carry
        return (count < new_tokens) & ~is_end(token).all()

    def one_more(carry: tuple) -> tuple:
        """Read the last token and choose the next; `count` of them are there already."""
        count, token, text, cache = carry
        position = lengths + count - 1

        def go_on(cache: Cache) -> tuple[Array, Cache]:
            return step(model, token, position, cache)

        def start_anew(cache: Cache) -> tuple[Array, Cache]:
            return prefill(model, text, position + 1, size)

        if depends_on_length(ropes):
            anew = turns_differently(ropes, position, position + 1)
            hidden, cache = lax.cond(anew, start_anew, go_on, cache)
        else:
            hidden, cache = go_on(cache)
        following = choose(model.logits(hidden), count, sampling)
        following = jnp.where(is_end(token), token, following)
        return count + 1, following, text.at[document, position + 1].set(following), cache

    hidden, cache = prefill(model, tokens, lengths, size)
    token = choose(model.logits(hidden), 0, sampling)
    text = jnp.pad(tokens, ((0, 0), (0, new_tokens))).at[document, lengths].set(token)
    carry = jnp.int32(1), token, text, cache
    count, token, text, _ = lax.while_loop(unfinished, one_more, carry)
    answers = jnp.take_along_axis(text, lengths[:, None] + new[None], axis=1)
    return jnp.where(new[None] < count, answers, token[:, None])
