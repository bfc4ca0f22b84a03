"""Linear biases on attention logits (Press et al. 2022, arXiv:2108.12409)."""

import math

import jax.numpy as jnp
import numpy as np

from jhessians.models.config import AlibiConfig
from jhessians.typing import Array, DTypeLike, Float


def biases(
    config: AlibiConfig, heads: int, positions: int, dtype: DTypeLike
) -> Float[Array, "h s"]:
    """What is added to the attention logits, [head, key's position].

    The paper's bias is slope · (key's position - query's position). A softmax over keys doesn't
    change when all its logits change by the same amount, so the query's position is left out. The
    models were trained with biases in their own number format, whose rounding errors grow with the
    position, so these are made in the same way.

    Args:
        config: Scale and rounding.
        heads: Number of query heads.
        positions: Length of the padded documents.
        dtype: The model's number format.

    Returns:
        float32, rounded as the models round them.
    """
    rounded = jnp.bfloat16 if config.bfloat16 else jnp.dtype(dtype)
    slope = jnp.asarray(slopes(heads), jnp.float32)
    if config.bfloat16:
        slope = slope.astype(rounded).astype(jnp.float32)
    bias = slope[:, None] * jnp.arange(positions, dtype=jnp.float32)[None, :]
    return bias.astype(rounded).astype(jnp.float32) * jnp.float32(config.scale)


def slopes(heads: int) -> np.ndarray:
    """Each head's slope, [head]: a geometric series, for 8 heads 1/2, 1/4, … 1/256.

    If the number of heads is no power of two, the next lower one's series comes first, and the
    remaining heads take every other slope of the next higher one's.

    Returns:
        float32, positive, the steepest first in either series.
    """
    lower = 2 ** math.floor(math.log2(heads))

    def series(count: int) -> np.ndarray:
        return 2.0 ** (-8 / count * np.arange(1, count + 1))

    rest = series(2 * lower)[::2][: heads - lower]
    return np.concatenate([series(lower), rest]).astype(np.float32)
