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
from jhessians.devices.offloading import is_in_host, to_device
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
    there = iter(_sums([leaf for _, leaf in leaves if not is_in_host(leaf)]))
    for path, leaf in leaves:
        sums = _sums_by_layer(leaf) if is_in_host(leaf) else next(there)
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(fetch(sums)).tobytes())
    return digest.hexdigest()


@jax.jit
def _sums(leaves: list[Any]) -> list[Array]:
    return [_sum(leaf) for leaf in leaves]


@jax.jit
def _sums_by_layer(x: Array) -> Array:
    """As `_sum`, of an array in host memory: the devices fetch one entry of its first axis."""

    def add(total: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
        number, layer = entry
        bits = _bits(to_device(layer))
        return total + _place_sums(bits, jnp.full(bits.shape, number)), None

    numbers = jnp.arange(x.shape[0], dtype=jnp.uint32)
    total, _ = lax.scan(add, jnp.zeros(2, jnp.uint32), (numbers, x))
    return jnp.stack([*total, *(jnp.uint32(size) for size in (*x.shape, x.dtype.itemsize))])


def _sum(x: Array) -> Array:
    """Two sums of a tensor's bits, each weighted by a hash of its place, with its size."""
    shape = (*x.shape, x.dtype.itemsize)
    bits = _bits(x)
    sums = _place_sums(bits, jnp.zeros(bits.shape, jnp.uint32))
    return jnp.stack([*sums, *(jnp.uint32(size) for size in shape)])


def _bits(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    width = min(4, x.dtype.itemsize)
    return lax.bitcast_convert_type(x, np.dtype(f"uint{8 * width}")).astype(jnp.uint32)


def _place_sums(bits: Array, place: Array) -> Array:
    """The two sums, of what stands at these places; each axis adds to them."""
    for axis in range(bits.ndim):
        place = place * 1_000_003 + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    add = partial(jnp.sum, dtype=jnp.uint32)
    first = add(bits * (_mixed(place) | 1))
    second = add(_mixed(bits ^ _mixed(place + 1)))
    return jnp.stack([first, second])


sums_of_bits: Callable[[Array], Array] = jax.jit(_sum)
"""Some whole numbers by which a tensor is known."""


def _mixed(x: Array) -> Array:
    """A hash of each number; murmur3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
