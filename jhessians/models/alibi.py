"""Linear biases on attention logits (Press et al. 2022, arXiv:2108.12409)."""

import math

import jax.numpy as jnp
import numpy as np

from jhessians.models.config import AlibiConfig
from jhessians.typing import Array, DTypeLike, Float


def biases(
    config: AlibiConfig, heads: int, positions: int, dtype: DTypeLike
) -> Float[Array, "h s"]:
    """What is added to every logit of a key, [head, key's position].

    The paper's bias is slope · (key - query); a softmax doesn't see what all keys of a query share,
    so the key's position alone does. The models were trained with biases in their own dtype, and
    its rounding, which grows with the position, is part of them.
    """
    rounded = jnp.bfloat16 if config.bfloat16 else jnp.dtype(dtype)
    slope = jnp.asarray(slopes(heads), jnp.float32)
    if config.bfloat16:
        slope = slope.astype(rounded).astype(jnp.float32)
    bias = slope[:, None] * jnp.arange(positions, dtype=jnp.float32)[None, :]
    return bias.astype(rounded).astype(jnp.float32) * jnp.float32(config.scale)


def slopes(heads: int) -> np.ndarray:
    """Each head's slope, [head]: a geometric series, for 8 heads 1/2, 1/4, … 1/256.

    Between powers of two, heads beyond the lower one take every other slope of the higher one.
    """
    lower = 2 ** math.floor(math.log2(heads))

    def series(count: int) -> np.ndarray:
        return 2.0 ** (-8 / count * np.arange(1, count + 1))

    rest = series(2 * lower)[::2][: heads - lower]
    return np.concatenate([series(lower), rest]).astype(np.float32)
