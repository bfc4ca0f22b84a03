"""Tensors from which the exporter fetches rows.

A `TensorRows` has a shape and returns ranges of its rows as numpy, so that a shard is written
piece by piece and the host never holds a whole tensor. Behind it may be a numpy array, or a jax
array on any devices of one or several processes.
"""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Shaped

from jhessians.devices.exchange import Exchange, mesh_of_rows
from jhessians.devices.mesh import in_host_memory

Window = tuple[slice, ...]


@runtime_checkable
class TensorRows(Protocol):
    """A tensor whose rows can be asked for, a range at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without padding."""
        ...

    def rows(self, start: int, stop: int, *, everywhere: bool = True) -> Shaped[np.ndarray, "..."]:
        """Rows [start, stop) on the host.

        In a run of several processes every process calls this in the same order.

        Args:
            start: The first row.
            stop: One more than the last.
            everywhere: Whether every process needs them; otherwise only the first one is sure to
                get them, and others may get zeros.
        """
        ...


class ArrayRows:
    """Rows of a numpy or jax array, or of one entry of a stack of them.

    Args:
        array: [*index, rows, columns] or [*index, values]. A jax array may be sharded over
            devices and processes; over several processes not along the indexed axes.
        index: Entry of the leading axes, e.g. the layer of a [layer, rows, columns] stack.
        shape: Shape without padding, if rows or columns are padded at the end.

    Raises:
        ValueError: If `index` is outside the stack or `shape` outside the entry.
    """

    def __init__(
        self,
        array: Shaped[Array, "..."] | Shaped[np.ndarray, "..."],
        *,
        index: int | tuple[int, ...] = (),
        shape: tuple[int, ...] | None = None,
    ):
        self._array = array
        self._index = (index,) if isinstance(index, int) else tuple(index)
        stored = tuple(array.shape[len(self._index) :])
        self.shape: tuple[int, ...] = stored if shape is None else tuple(shape)
        outside = any(not 0 <= i < n for i, n in zip(self._index, array.shape, strict=False))
        misfit = len(self.shape) != len(stored) or any(
            n > m for n, m in zip(self.shape, stored, strict=False)
        )
        if outside or misfit or not stored:
            raise ValueError(
                f"no entry {self._index} of shape {self.shape} in an array of {array.shape}"
            )

    def rows(self, start: int, stop: int, *, everywhere: bool = True) -> Shaped[np.ndarray, "..."]:
        """Rows [start, stop), [stop − start, *shape[1:]], in the array's own dtype."""
        window = (
            *(slice(i, i + 1) for i in self._index),
            slice(start, stop),
            *(slice(0, n) for n in self.shape[1:]),
        )
        if not isinstance(self._array, jax.Array):
            block = np.asarray(self._array[window])
        elif self._array.is_fully_addressable:
            block = _fetch_local(self._array, window)
        else:
            block = _fetch_global(self._array, window, len(self._index), everywhere)
        return block.reshape(stop - start, *self.shape[1:])


class ScaledRows:
    """Another source multiplied by a number, in float32 or wider."""

    def __init__(self, source: TensorRows, scale: float):
        self._source = source
        self._scale = scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the scaled source."""
        return self._source.shape

    def rows(self, start: int, stop: int, *, everywhere: bool = True) -> Shaped[np.ndarray, "..."]:
        """Rows [start, stop), scaled."""
        block = self._source.rows(start, stop, everywhere=everywhere)
        wide = np.promote_types(block.dtype, np.float32)
        return np.multiply(block, wide.type(self._scale), dtype=wide)


def _fetch_local(array: Array, window: Window) -> np.ndarray:
    """`array[window]` of an array that is on this process's devices alone.

    Each device cuts out its own part. Slicing the sharded array as a whole is worse: with a traced
    start XLA copies the entire array to every device, and with a static one it compiles again for
    every range.

    Returns:
        The window, in one numpy array.
    """
    out = np.empty([w.stop - w.start for w in window], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        held = [h.indices(n) for h, n in zip(shard.index, array.shape, strict=True)]
        common = [
            (max(w.start, lo), min(w.stop, hi)) for w, (lo, hi, _) in zip(window, held, strict=True)
        ]
        if any(start >= stop for start, stop in common):
            continue
        starts = [start - lo for (start, _), (lo, _, _) in zip(common, held, strict=True)]
        sizes = [stop - start for start, stop in common]
        data = in_host_memory(shard.data)
        if isinstance(data, np.ndarray):
            piece: Any = data[tuple(slice(at, at + n) for at, n in zip(starts, sizes, strict=True))]
        else:
            piece = jax.lax.dynamic_slice(data, starts, sizes)
        target = tuple(
            slice(start - w.start, stop - w.start)
            for (start, stop), w in zip(common, window, strict=True)
        )
        out[target] = np.asarray(piece)
    return out


def _fetch_global(array: Array, window: Window, indexed: int, everywhere: bool) -> np.ndarray:
    """`array[window]` of an array that several processes hold; all of them call this.

    First the stack's entry is taken, for which no device needs another one's data; then the rows,
    with static bounds, so that XLA moves these rows and not the whole array.

    Returns:
        The window: on every process, or else on the first one, and zeros on others.
    """
    from jax.experimental import multihost_utils

    entry = _take_entry(array, tuple(np.int32(w.start) for w in window[:indexed]))
    start, stop = window[indexed].start, window[indexed].stop
    mesh = None if everywhere or start == stop else mesh_of_rows(array, axis=indexed)
    if mesh is not None:
        block = Exchange(mesh).bring_rows(entry, start, stop)
        if block is None:
            return no_rows(tuple(w.stop - w.start for w in window[indexed:]), array.dtype)
        return block[(slice(None), *window[indexed + 1 :])]
    rows = _take_window(entry, tuple((w.start, w.stop) for w in window[indexed:]))
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def no_rows(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """Zeros that take no memory, in place of rows that another process gets."""
    return np.broadcast_to(np.zeros((), dtype), shape)


@jax.jit
def _take_entry(array: Array, index: tuple[np.int32, ...]) -> Array:
    for i in index:
        array = jax.lax.dynamic_index_in_dim(array, i, axis=0, keepdims=False)
    return array


@functools.partial(jax.jit, static_argnums=1)
def _take_window(array: Array, bounds: tuple[tuple[int, int], ...]) -> Array:
    return jax.lax.slice(array, [b[0] for b in bounds], [b[1] for b in bounds])
