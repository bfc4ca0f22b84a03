"""Causal softmax attention, a block of queries at a time, with a backward pass of its own.

A block meets only the keys that are not after it, and the weights [query, key] exist for one block.
For the backward pass the output and each row's normalizer are kept; the weights are computed again
(Dao et al. 2022, arXiv:2205.14135). On two CPU cores a pass over documents of 256 tokens takes 0.88
of the time that it takes with the plain formula.

query: [document, group, head of the group, position, feature]. key, value: [document, group,
position, feature].
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jhessians.models.layers import PRODUCT, at_least_float32
from jhessians.typing import Array, Float, Int

MOST_BLOCKS = 8
SMALLEST_BLOCK = 128  # queries; 64 were no faster, and took longer to compile


class Terms(NamedTuple):
    """What makes logits besides query and key; constants, but for the sinks.

    Attributes:
        scale: Of query · key.
        window: How many positions back a query sees, its own included.
        bias: Added to the logits, [head, key's position].
        sinks: A logit of each head that every query sees, and whose value is nothing.
    """

    scale: Float[Array, ""]
    window: Int[Array, ""]
    bias: Float[Array, "g q t"] | None = None
    sinks: Float[Array, "g q"] | None = None


def causal_attention(
    query: Float[Array, "n g q s d"],
    key: Float[Array, "n g s d"],
    value: Float[Array, "n g s d"],
    terms: Terms,
    *,
    softcap: float | None = None,
    backward_only: bool = False,
) -> Float[Array, "n g q s d"]:
    """softmax(softcap(scale · query keyᵀ) + bias) value; the softmax at least in float32.

    Args:
        query: Of all positions.
        key: Of all positions.
        value: Of all positions.
        terms: The rest.
        softcap: c in c · tanh(logit / c), or None.
        backward_only: Whether derivatives are taken backwards alone: faster, and leaner in memory,
            but `jax.jvp` knows no way through.

    Returns:
        The values' mean for each query, weighted by the softmax.
    """
    if backward_only:
        return _with_own_backward(softcap, query, key, value, terms)
    return _forward(softcap, query, key, value, terms)[0]


def attention_at(
    query: Float[Array, "n g q 1 d"],
    key: Float[Array, "n g t d"],
    value: Float[Array, "n g t d"],
    terms: Terms,
    position: Int[Array, " n"],
    *,
    softcap: float | None = None,
) -> Float[Array, "n g q 1 d"]:
    """`causal_attention` of one query of each document, which stands at `position`.

    Args:
        query: Of that position.
        key: Of all positions; those after the query's are not seen.
        value: Of all positions.
        terms: The rest.
        position: Of each document's query.
        softcap: See `causal_attention`.

    Returns:
        As `causal_attention`, for the one query.
    """
    back = position[:, None] - jnp.arange(key.shape[2], dtype=jnp.int32)[None]
    logits, _ = _logits(softcap, query, key, terms, back[:, None, None, None])
    return _mix(logits, value, terms)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_own_backward(softcap, query, key, value, terms):
    return _forward(softcap, query, key, value, terms)[0]


def _forward(softcap, query, key, value, terms):
    outputs, normalizers = [], []
    for start, stop in _blocks(query.shape[3]):
        back = _back(start, stop)
        logits, _ = _logits(softcap, query[..., start:stop, :], key[:, :, :stop], terms, back)
        output, normalizer = _mix(logits, value[:, :, :stop], terms)
        outputs.append(output)
        normalizers.append(normalizer)
    return jnp.concatenate(outputs, 3), jnp.concatenate(normalizers, 3)


def _mix(logits, value, terms):
    """Values weighted by the softmax of `logits`, and the softmax's normalizers."""
    most = logits.max(-1)
    if terms.sinks is not None:
        sinks = terms.sinks.astype(logits.dtype)[None, :, :, None]
        most = jnp.maximum(most, sinks)
    weights = jnp.exp(logits - most[..., None])
    total = weights.sum(-1)
    if terms.sinks is not None:
        total += jnp.exp(sinks - most)
    mixed = jnp.einsum("ngqst,ngtd->ngqsd", weights.astype(value.dtype), value)
    output = (mixed.astype(total.dtype) / total[..., None]).astype(value.dtype)
    return output, most + jnp.log(total)


def _forward_rule(softcap, query, key, value, terms):
    output, normalizer = _forward(softcap, query, key, value, terms)
    output, normalizer = (checkpoint_name(x, PRODUCT) for x in (output, normalizer))
    return output, (query, key, value, terms, output, normalizer)


def _backward_rule(softcap, residuals, g):
    query, key, value, terms, output, normalizer = residuals
    wide = normalizer.dtype
    # What the softmax's derivative takes off every weight's gradient, [n, g, q, s].
    mean = (g.astype(wide) * output.astype(wide)).sum(-1)
    queries, keys, values = [], jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)
    for start, stop in _blocks(query.shape[3]):
        block, g_block = query[..., start:stop, :], g[..., start:stop, :]
        logits, slope = _logits(softcap, block, key[:, :, :stop], terms, _back(start, stop))
        weights = jnp.exp(logits - normalizer[..., start:stop, None])
        narrow = weights.astype(value.dtype)
        of_values = jnp.einsum("ngqst,ngqsd->ngtd", narrow, g_block)
        values = values.at[:, :, :stop].add(of_values.astype(wide))
        of_weights = jnp.einsum("ngqsd,ngtd->ngqst", g_block, value[:, :, :stop]).astype(wide)
        of_logits = weights * (of_weights - mean[..., start:stop, None])
        of_logits = (of_logits * slope).astype(key.dtype)
        queries.append(jnp.einsum("ngqst,ngtd->ngqsd", of_logits, key[:, :, :stop]))
        of_keys = jnp.einsum("ngqst,ngqsd->ngtd", of_logits, block)
        keys = keys.at[:, :, :stop].add(of_keys.astype(wide))
    sinks = None
    if terms.sinks is not None:
        share = jnp.exp(terms.sinks.astype(wide)[None, :, :, None] - normalizer)
        sinks = -(share * mean).sum((0, 3)).astype(terms.sinks.dtype)
    constants = Terms(jnp.zeros_like(terms.scale), None, None, sinks)  # type: ignore[arg-type]
    return (jnp.concatenate(queries, 3), keys.astype(key.dtype), values.astype(value.dtype),
            constants)  # fmt: skip


_with_own_backward.defvjp(_forward_rule, _backward_rule)


def _logits(softcap, block, key, terms, back):
    """Logits of a block of queries, and their derivative by query · key.

    `back` says how many positions each key is before each query, [(document, 1, 1,) query, key].

    Returns:
        The logits, the lowest number there is where a key isn't seen; and the derivative.
    """
    wide = at_least_float32(block.dtype)
    products = jnp.einsum("ngqsd,ngtd->ngqst", block, key).astype(wide)
    scale = terms.scale.astype(wide)
    logits, slope = products * scale, scale
    if softcap is not None:
        share = jnp.tanh(logits / softcap)
        logits, slope = softcap * share, scale * (1 - share * share)
    if terms.bias is not None:
        logits = logits + terms.bias.astype(wide)[None, :, :, None, : key.shape[2]]
    seen = (back >= 0) & (back < terms.window)
    return jnp.where(seen, logits, jnp.finfo(wide).min), slope


def _back(start, stop):
    """How many positions keys 0 to `stop` are before queries `start` to `stop`."""
    rows = jnp.arange(start, stop, dtype=jnp.int32)[:, None]
    return rows - jnp.arange(stop, dtype=jnp.int32)[None]


def _blocks(positions: int) -> Iterator[tuple[int, int]]:
    """First and last+1 query of each block."""
    count = max(1, min(MOST_BLOCKS, positions // SMALLEST_BLOCK))
    edges = [positions * k // count for k in range(count + 1)]
    return zip(edges[:-1], edges[1:], strict=True)
