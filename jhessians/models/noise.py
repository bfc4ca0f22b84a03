"""Random numbers that are the same under every configuration of JAX.

`jax.random` draws other numbers when its user picks another generator (`jax_default_prng_impl`),
another way to number the draws (`jax_threefry_partitionable`), 64-bit arrays (`jax_enable_x64`) or
another Gumbel (`jax_high_dynamic_range_gumbel`). What is drawn here depends on the arguments
alone, and equals what `jax.random` draws as JAX 0.10 is configured when nobody changes it.

A key is a pair of uint32, as the Threefry generator takes it (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3").
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32

from jhessians.typing import Array, Float, Int, UInt32


def key_of(seed: int) -> UInt32[Array, "2"]:
    """The key of a seed, of which the lowest 32 bits count."""
    return jnp.array([0, int(seed) % 2**32], jnp.uint32)


def fold_in(key: UInt32[Array, "2"], number: Int[Array, ""] | int) -> UInt32[Array, "2"]:
    """Another key for each number, of which the lowest 32 bits count."""
    return _hash(key, jnp.asarray(number).astype(jnp.uint32)[None])[:, 0]


def gumbel(key: UInt32[Array, "2"], count: int) -> Float[Array, " count"]:
    """Standard Gumbel noise in float32, -log(-log(u)) with u uniform in (0, 1)."""
    first, second = _hash(key, jnp.arange(count, dtype=jnp.uint32))
    # 23 random bits behind the exponent of 1.0 make a number in [1, 2).
    one = np.float32(1).view(np.uint32)
    fraction = lax.bitcast_convert_type(((first ^ second) >> np.uint32(9)) | one, jnp.float32)
    uniform = fraction - np.float32(1) + np.finfo(np.float32).tiny
    return -jnp.log(-jnp.log(uniform))


def _hash(key: UInt32[Array, "2"], numbers: UInt32[Array, " n"]) -> UInt32[Array, "2 n"]:
    """Two random words for each number."""
    counters = jnp.concatenate([jnp.zeros_like(numbers), numbers])
    return threefry_2x32(key, counters).reshape(2, -1)
