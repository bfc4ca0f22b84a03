"""Gram matrices xᵀx, of which only blocks on and above the diagonal are computed and kept.

x: [row, feature]. A Gram matrix of d features is symmetric, so it is kept packed: its rows are
divided into B blocks, and each block holds the columns from its own diagonal block to the last.
With B = 3 that is two thirds of the arithmetic and of the memory. Each block's operand is copied
out of x, so more blocks need not be faster: measured on 2 cores in steps of models with d from 256
to 768, 4 blocks saved less than their copies cost, and 2 were slower for the widest model.
"""

from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from jhessians.typing import Array, Bool, DTypeLike, Float

Filling = Callable[[int, int], tuple[int, int]]
"""(rows, columns) → as many or more of either."""

BLOCKS = 3
SMALLEST = 512  # measured on CPU: below, the smaller products cost more than the halves save


def block_bounds(d: int) -> list[tuple[int, int]]:
    """The range of rows [start, stop) of each block of a packed d × d matrix."""
    blocks = BLOCKS if d >= SMALLEST else 1
    edges = [d * k // blocks for k in range(blocks + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def packed_shapes(d: int) -> tuple[tuple[int, int], ...]:
    """Shapes of the blocks of a packed d × d matrix: (rows, d - first row)."""
    return tuple((stop - start, d - start) for start, stop in block_bounds(d))


def packed_gram(
    x: Float[Array, "r d"],
    *,
    counted: Bool[Array, " r"] | None = None,
    multiple: int = 1,
    dtype: DTypeLike | None = None,
    filled: Filling | None = None,
) -> tuple[Float[Array, "_ _"], ...]:
    """The packed Gram matrix xᵀx; arguments as in `packed_product`."""
    return packed_product(x, x, counted=counted, multiple=multiple, dtype=dtype, filled=filled)


def packed_product(
    x: Float[Array, "r d"],
    y: Float[Array, "r d"],
    *,
    counted: Bool[Array, " r"] | None = None,
    multiple: int = 1,
    dtype: DTypeLike | None = None,
    filled: Filling | None = None,
) -> tuple[Float[Array, "_ _"], ...]:
    """xᵀy packed, of which the caller knows that it is symmetric.

    Args:
        x: One vector per row.
        y: One vector per row, as many as in x.
        counted: Which rows are summed, by default all. The other rows must be finite too.
        multiple: The rows of each block are padded with zeros to a multiple of this, so that
            they divide among devices. The operand is padded, which costs less than the product.
        dtype: Number format of the running sum, by default that of x.
        filled: Gives the rows and columns to which a device's rows and columns are filled up with
            zeros, again in the operands; by default they aren't.

    Returns:
        One array per block, (padded rows, d - first row); filled up, if so wanted.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if dtype.itemsize > 4:
        x, y = x.astype(dtype), y.astype(dtype)
    blocks = []
    for start, stop in block_bounds(x.shape[1]):
        left = x[:, start:stop]
        if counted is not None:  # masking one operand is enough, and this one is copied anyway
            left = jnp.where(counted[:, None], left, 0)
        if missing := -(stop - start) % multiple:
            left = jnp.pad(left, ((0, 0), (0, missing)))
        right = y[:, start:]
        if filled is not None:
            share, columns = left.shape[1] // multiple, right.shape[1]
            more, wider = filled(share, columns)
            left = left.reshape(-1, multiple, share)
            left = jnp.pad(left, ((0, 0), (0, 0), (0, more - share))).reshape(len(left), -1)
            right = jnp.pad(right, ((0, 0), (0, wider - columns)))
        over_rows = (((0,), (0,)), ((), ()))
        blocks.append(lax.dot_general(left, right, over_rows, preferred_element_type=dtype))
    return tuple(blocks)


def packed_trace(blocks: Sequence[Float[Array, "*stack _ _"]], d: int) -> Float[Array, "*stack"]:
    """The trace of packed d × d matrices, whose rows may be padded and sharded."""
    traces = [
        jnp.trace(block[..., : stop - start, : stop - start], axis1=-2, axis2=-1)
        for (start, stop), block in zip(block_bounds(d), blocks, strict=True)
    ]
    return jnp.stack(traces).sum(0)


def unpack_traced(
    blocks: Sequence[Float[Array, "*stack _ _"]], d: int
) -> Float[Array, "*stack d d"]:
    """`unpack` for arrays of JAX, under jit too, with any leading axes.

    Args:
        blocks: Without padded rows.
        d: Rows of the whole matrix.

    Returns:
        The whole matrices, exactly symmetric.
    """
    full = jnp.zeros((*blocks[0].shape[:-2], d, d), blocks[0].dtype)
    for (start, stop), block in zip(block_bounds(d), blocks, strict=True):
        full = full.at[..., start:stop, start:].set(block)
    return jnp.triu(full) + jnp.triu(full, 1).swapaxes(-1, -2)


def unpack(blocks: Iterable[Array | np.ndarray], d: int) -> np.ndarray:
    """The whole symmetric matrix on the host, from blocks whose rows may be padded.

    Only the upper triangle of each diagonal block is used, so the result is exactly symmetric.

    Args:
        blocks: One after the other, so that those of an iterator need not all be in memory.
        d: Rows of the whole matrix.

    Returns:
        [d, d], in the blocks' dtype.
    """
    full, found = np.empty((0, 0)), iter(blocks)
    for start, stop in block_bounds(d):
        rows = np.asarray(next(found))[: stop - start]
        if start == 0:
            full = np.empty((d, d), rows.dtype)
        full[start:stop, start:] = rows
        full[stop:, start:stop] = rows[:, stop - start :].T
        del rows  # before the next block comes
        square = full[start:stop, start:stop]
        square[...] = np.triu(square) + np.triu(square, 1).T
    return full
