"""The loss where the head is spread over devices: a slice of the vocabulary at a time.

Each slice's rows of the head's matrix are gathered, used for all positions, and dropped. The first
time round they give each position's normalizer and label, the second time the gradient. So the
head is sent twice, but never whole in memory; a slice is one or more of the blocks of tokens that
labels are drawn from (`jhessians.models.sampling`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.capture.shards import rows
from jhessians.models.decoder import Decoder
from jhessians.models.sampling import Noise, best_of, blocks_of, noise_of
from jhessians.typing import Array, Float, Int

NO_LABEL = -100
SLICE_LOGITS = 1 << 22
"""Logits of a slice: 16 MiB in float32, of which a few copies exist at once."""
SLICE_WEIGHTS = 1 << 24
"""Entries of a slice of the head's matrix: 32 MiB in bfloat16."""


class _Seen(NamedTuple):
    """What a position's loss is made of, from the slices so far; the labels' for each draw.

    Attributes:
        normalizer: The logarithm of the summed exponentials; of `log_odds` without the label's.
        total: The sum of the logits.
        score: By which the label so far won.
        label: The label; a data set's is known from the start.
        chosen: The label's logit.
    """

    normalizer: Float[Array, " t"]
    total: Float[Array, " t"]
    score: Float[Array, "k t"]
    label: Int[Array, "k t"]
    chosen: Float[Array, "k t"]


def sliced_losses(
    model: Decoder,
    hidden: Float[Array, "t d"],
    targets: Int[Array, " t"],
    weights: Float[Array, " t"],
    document: Int[Array, " t"],
    position: Int[Array, " t"],
    *,
    sampled: bool,
    seed: int = 0,
    draws: int = 1,
    log_odds: bool = False,
    smoothing: float = 0.0,
) -> tuple[Float[Array, " k"], Float[Array, "k t d"]]:
    """The weighted loss of all positions, and its gradient at the hidden states.

    Args:
        model: Its table is in shards, or whole.
        hidden: What the head reads.
        targets: The data set's labels; `NO_LABEL` where there is none.
        weights: Of the positions, at least in float32.
        document: Number of each position's document.
        position: Number of each position in its document.
        sampled: Whether labels are drawn from the model's distribution.
        seed: Of the draws.
        draws: K, how many labels a position has.
        log_odds: Whether the loss is the label's log-odds, which can't be of sampled labels, or
            else cross-entropy.
        smoothing: Share of each target that is spread over the vocabulary.

    Returns:
        One loss for each draw of labels, and its gradient.
    """
    t, d = hidden.shape
    vocabulary, wide = model.config.vocabulary_size, weights.dtype
    blocks, width = blocks_of(vocabulary)
    together = min(SLICE_LOGITS // max(1, t), SLICE_WEIGHTS // d) // width
    together = max(1, min(together, blocks))
    size, slices = together * width, jnp.arange(-(-blocks // together), dtype=jnp.int32)

    def products(number: Array) -> tuple[Array, Array, Array]:
        """The numbers of a slice's tokens, their rows of the table, and the products with these."""
        tokens = number * size + jnp.arange(size, dtype=jnp.int32)
        table = rows(model.table, jnp.minimum(tokens, vocabulary - 1))
        return tokens, table, hidden @ table.T

    def logits_of(products: Array, tokens: Array) -> Array:
        there = jnp.minimum(tokens, vocabulary - 1)
        return model.logits_of_products(products, there).astype(wide)

    noise = None
    if sampled:
        missing = len(slices) * together - blocks
        of_draw = partial(noise_of, document, position, vocabulary, seed)
        noise = jax.vmap(of_draw)(jnp.arange(draws))
        noise = Noise(jnp.pad(noise.block, ((0, 0), (0, 0), (0, missing))), noise.token)

    def look(seen: _Seen, number: Array) -> tuple[_Seen, None]:
        tokens, _, raw = products(number)
        there = (tokens < vocabulary)[None]
        z = jnp.where(there, logits_of(raw, tokens), -jnp.inf)
        counted = z
        if log_odds:
            counted = jnp.where(tokens[None] == seen.label[0][:, None], -jnp.inf, z)
        normalizer = jnp.logaddexp(seen.normalizer, jax.nn.logsumexp(counted, axis=-1))
        total = seen.total + jnp.where(there, z, 0).sum(-1)
        score, label = seen.score, seen.label
        if noise is not None:
            by_block = z.astype(jnp.float32).reshape(t, together, width)

            def best(of_blocks: Array, of_tokens: Array) -> tuple[Array, Array]:
                here = lax.dynamic_slice_in_dim(of_blocks, number * together, together, axis=1)
                return best_of(by_block, Noise(here, of_tokens))

            score, label = jax.vmap(best)(*noise)
            label += number * size
            better = score > seen.score
            score, label = (
                jnp.where(better, new, old)
                for new, old in ((score, seen.score), (label, seen.label))
            )
        inside = label - number * size
        here = (inside >= 0) & (inside < size)
        entry = jnp.take_along_axis(z, jnp.clip(inside, 0, size - 1).T, axis=1).T
        chosen = jnp.where(here, entry, seen.chosen)
        return _Seen(normalizer, total, score, label, chosen), None

    known = jnp.where(targets == NO_LABEL, 0, targets).astype(jnp.int32)
    start = _Seen(
        jnp.full(t, -jnp.inf, wide),
        jnp.zeros(t, wide),
        jnp.full((draws, t), -jnp.inf, jnp.float32),
        jnp.broadcast_to(known[None], (draws, t)),
        jnp.zeros((draws, t), wide),
    )
    seen, _ = lax.scan(look, start, slices)
    normalizer = seen.normalizer[None]
    losses = normalizer - seen.chosen
    if smoothing and not log_odds:
        losses += smoothing * (normalizer - seen.total[None] / vocabulary - losses)

    def gradient(number: Array, total: Array) -> Array:
        tokens, table, raw = products(number)
        z, back = jax.vjp(lambda raw: logits_of(raw, tokens), raw)
        p = jnp.exp(z - seen.normalizer[:, None])

        def one(label: Array) -> Array:
            is_label = tokens[None] == label[:, None]
            if log_odds:
                slope = jnp.where(is_label, -1, p)
            else:
                slope = p - jnp.where(is_label, 1 - smoothing, 0) - smoothing / vocabulary
            slope = jnp.where((tokens < vocabulary)[None], slope, 0) * weights[:, None]
            (of_products,) = back(slope)
            return jnp.matmul(of_products, table, preferred_element_type=wide)

        return total + jax.vmap(one)(seen.label)

    zeros = jnp.zeros((draws, t, d), wide)
    gradients = lax.fori_loop(0, len(slices), gradient, zeros)
    return (weights[None] * losses).sum(-1), gradients.astype(hidden.dtype)
