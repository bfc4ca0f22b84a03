"""Labels drawn from a model's own distribution, the same ones however rows are batched."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.models.noise import fold_in, gumbel, key_of
from jhessians.typing import Array, Float, Int, Int32


def sample(
    logits: Float[Array, "t v"],
    document: Int[Array, " t"],
    position: Int[Array, " t"],
    seed: int,
    draw: Int[Array, ""] | int = 0,
) -> Int32[Array, " t"]:
    """One label per row from softmax(logits): first a block of tokens, then one of its tokens.

    Both draws use the Gumbel-max trick, and the two stages take 2 √V random numbers a row instead
    of V. The row's key is a function of (seed, draw, document, position), so the label does not
    move with batch, padding or mesh. (Inverting the distribution function would take a single
    random number, but there rounding moves the result far more often.)

    Everything is in float32, and the generator is fixed: models in float32 and float64 draw the
    same labels, however JAX is configured (but where rounding of the logits decides between two).

    Args:
        logits: Of any floating-point type; -inf for tokens that cannot be drawn.
        document: Number of each row's document.
        position: Number of each row's position in its document.
        seed: Other seeds draw other labels.
        draw: The same for several draws from the same logits.

    Returns:
        Token ids, from 0 to v - 1.
    """
    rows, vocabulary = logits.shape
    blocks, width = blocks_of(vocabulary)
    missing = blocks * width - vocabulary
    padded = jnp.pad(logits.astype(jnp.float32), ((0, 0), (0, missing)), constant_values=-jnp.inf)
    noise = noise_of(document, position, vocabulary, seed, draw)
    return best_of(padded.reshape(rows, blocks, width), noise)[1]


class Noise(NamedTuple):
    """What a row's draw depends on, besides its logits.

    Attributes:
        block: Of each block of tokens.
        token: Of each token of whichever block is drawn.
    """

    block: Float[Array, "t b"]
    token: Float[Array, "t w"]


def blocks_of(vocabulary: int) -> tuple[int, int]:
    """How many blocks of tokens there are, and of how many tokens each is, the last one filled."""
    width = math.isqrt(vocabulary - 1) + 1
    return -(-vocabulary // width), width


def noise_of(
    document: Int[Array, " t"],
    position: Int[Array, " t"],
    vocabulary: int,
    seed: int,
    draw: Int[Array, ""] | int,
) -> Noise:
    """The noise of every row; arguments as of `sample`."""
    blocks, width = blocks_of(vocabulary)
    of_draw = fold_in(key_of(seed), draw)

    def noise(document: Array, position: Array) -> Noise:
        key = fold_in(fold_in(of_draw, document), position)
        return Noise(gumbel(fold_in(key, 0), blocks), gumbel(fold_in(key, 1), width))

    return jax.vmap(noise)(document, position)


def best_of(
    logits: Float[Array, "t b w"], noise: Noise
) -> tuple[Float[Array, " t"], Int32[Array, " t"]]:
    """The label drawn from some blocks of tokens.

    Args:
        logits: By block, in float32; -inf for tokens that cannot be drawn.
        noise: Of these blocks.

    Returns:
        The score of the label's block, to be compared with those of other blocks; and the label's
        number among these tokens.
    """
    scores = jax.nn.logsumexp(logits, axis=-1) + noise.block
    block = _argmax(scores)
    within = jnp.take_along_axis(logits, block[:, None, None], axis=1)[:, 0]
    score = jnp.take_along_axis(scores, block[:, None], axis=1)[:, 0]
    return score, block * logits.shape[-1] + _argmax(within + noise.token)


def _argmax(x: Float[Array, "t n"]) -> Int32[Array, " t"]:
    # jnp.argmax would count in 64 bits where those are allowed.
    return lax.argmax(x, 1, jnp.int32)
