"""Tell weights apart by a number, wherever they lie and however they are spread over devices."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jhessians.devices.hosts import fetch
from jhessians.typing import Array


def fingerprint(model: nnx.Module) -> str:
    """A hash of all of a model's variables: of their bits, and of where each number stands.

    Whole numbers modulo 2³² are summed, which gives the same in any order. It finds accidents, not
    forgeries.

    Args:
        model: Any; with several hosts, all of them call this.

    Returns:
        Hexadecimal digits, the same on every mesh.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model))
    for path, sums in zip(
        [path for path, _ in leaves], _sums([leaf for _, leaf in leaves]), strict=True
    ):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(fetch(sums)).tobytes())
    return digest.hexdigest()


@jax.jit
def _sums(leaves: list[Any]) -> list[Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(x: Array) -> Array:
    """Two sums of a tensor's bits, each weighted by a hash of its place, with its size."""
    shape = (*x.shape, x.dtype.itemsize)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    width = min(4, x.dtype.itemsize)
    bits = lax.bitcast_convert_type(x, np.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        place = place * 1_000_003 + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    add = partial(jnp.sum, dtype=jnp.uint32)
    first = add(bits * (_mixed(place) | 1))
    second = add(_mixed(bits ^ _mixed(place + 1)))
    return jnp.stack([first, second, *(jnp.uint32(size) for size in shape)])


sums_of_bits: Callable[[Array], Array] = jax.jit(_sum)
"""Some whole numbers by which a tensor is known."""


def _mixed(x: Array) -> Array:
    """A hash of each number; murmur3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
