"""Whole matrices from and to hosts, where every device has some rows of each.

As many matrices move at a time as there are hosts, one from or to each, in a single all-to-all
exchange: nothing goes where it isn't needed. Of a host's matrix each of its devices passes on some
columns.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped

from jhessians.devices.mesh import axis_names
from jhessians.typing import Array, DTypeLike

Doors = tuple[tuple[int, ...], ...]
"""For each host the devices, by their place in the mesh, through which its matrices pass."""


class Exchange:
    """Moves matrices between hosts and the devices of all of them; every host makes each call.

    Args:
        mesh: Devices of all hosts.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.doors = doors([device.process_index for device in mesh.devices.flat])

    def bring(self, arrays: Mapping[int, Array]) -> Shaped[np.ndarray, "r c"] | None:
        """Bring an array to each of some hosts.

        Args:
            arrays: Host → an array [row, column] whose rows are spread over the devices; all of one
                shape.

        Returns:
            This host's array; None where there is none for it.
        """
        filler = next(iter(arrays.values()))
        everyones = tuple(arrays.get(host, filler) for host in range(len(self.doors)))
        pieces = to_hosts(everyones, mesh=self.mesh, doors=self.doors)
        host = jax.process_index()
        if host not in arrays:
            return None
        whole = np.empty(filler.shape, filler.dtype)
        for shard in pieces.addressable_shards:
            number, width = shard.index[0].start or 0, pieces.shape[2]
            if number in self.doors[host]:
                first = self.doors[host].index(number) * width
                part = whole[:, first : first + width]
                part[...] = np.asarray(shard.data)[0, :, : part.shape[1]]
        return whole

    def spread(
        self, whole: Shaped[np.ndarray, "r c"] | None, shape: tuple[int, int], dtype: DTypeLike
    ) -> list[Array]:
        """Spread the rows of an array of each host over all devices.

        Args:
            whole: This host's array; None for zeros.
            shape: Of every host's array.
            dtype: Of every host's array.

        Returns:
            Each host's array, its rows padded with zeros to a multiple of the devices.
        """
        rows, columns = shape
        devices, host = self.mesh.size, jax.process_index()
        width = -(-columns // len(self.doors[0]))

        def piece(index: Any) -> np.ndarray:
            passed = np.zeros((1, rows + -rows % devices, width), dtype)
            number = index[0].start or 0
            if whole is not None and number in self.doors[host]:
                first = self.doors[host].index(number) * width
                part = whole[:, first : first + width]
                passed[0, :rows, : part.shape[1]] = part
            return passed

        pieces = jax.make_array_from_callback(
            (devices, rows + -rows % devices, width),
            NamedSharding(self.mesh, P(axis_names(self.mesh))), piece,
        )  # fmt: skip
        return list(from_hosts(pieces, columns=columns, mesh=self.mesh, doors=self.doors))

    def bring_rows(self, array: Array, start: int, stop: int) -> Shaped[np.ndarray, "r c"] | None:
        """Bring some rows to the first host.

        Args:
            array: [row, column], its rows spread over the devices.
            start: The first of the rows.
            stop: One more than the last.

        Returns:
            The rows on the first host, None on the others.
        """
        each = array.shape[0] // self.mesh.size
        pieces = rows_to_first(array, mesh=self.mesh, doors=self.doors, start=start, stop=stop)
        if jax.process_index():
            return None
        received = {
            self.doors[0].index(shard.index[0].start or 0): np.asarray(shard.data)[0]
            for shard in pieces.addressable_shards
            if (shard.index[0].start or 0) in self.doors[0]
        }
        found = np.empty((stop - start, *array.shape[1:]), array.dtype)
        for k, number in enumerate(range(start // each, -(-stop // each))):
            step, door = divmod(k, len(self.doors[0]))
            first, last = max(start, number * each), min(stop, (number + 1) * each)
            skipped = first - number * each - _offset(number, start, stop, each)
            piece = received[door][step, skipped : skipped + last - first]
            found[first - start : last - start] = piece
        return found


def mesh_of_rows(array: Array, *, axis: int) -> Mesh | None:
    """The devices of all hosts, over which an array's rows and nothing else are spread.

    Args:
        array: On some devices.
        axis: That of the rows.

    Returns:
        The mesh for an `Exchange`; None where the array lies otherwise.
    """
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    mesh = sharding.mesh
    spread = NamedSharding(mesh, P(*[None] * axis, axis_names(mesh)))
    hosts = {device.process_index for device in mesh.devices.flat}
    if len(hosts) < jax.process_count() or array.shape[axis] % mesh.size:
        return None
    return mesh if sharding.is_equivalent_to(spread, array.ndim) else None


def doors(hosts: list[int]) -> Doors:
    """Choose the devices through which hosts' matrices pass: as many for each host.

    Args:
        hosts: The host of each device of the mesh.

    Returns:
        Devices by host.
    """
    numbers = [[i for i, other in enumerate(hosts) if other == host] for host in sorted({*hosts})]
    each = min(map(len, numbers))
    return tuple(tuple(own[:each]) for own in numbers)


@partial(jax.jit, static_argnames=("mesh", "doors"))
def to_hosts(
    arrays: tuple[Array, ...], *, mesh: Mesh, doors: Doors
) -> Shaped[Array, "device r width"]:
    """Give every host's devices the columns that they pass on to it.

    Args:
        arrays: For each host an array [row, column] whose rows are spread over the devices.
        mesh: The devices.
        doors: Through which matrices pass.

    Returns:
        One device's columns after another's.
    """
    axes, columns = axis_names(mesh), arrays[0].shape[1]
    width = -(-columns // len(doors[0]))

    def local(arrays: tuple[Array, ...]) -> Array:
        missing = width * len(doors[0]) - columns
        padded = [jnp.pad(x, ((0, 0), (0, missing))) for x in arrays] if missing else arrays
        sent = [padded[0][:, :width]] * mesh.size  # nobody looks at what others than doors get
        for x, numbers in zip(padded, doors, strict=True):
            for k, number in enumerate(numbers):
                sent[number] = x[:, k * width : (k + 1) * width]
        received = lax.all_to_all(jnp.stack(sent), axes, split_axis=0, concat_axis=0)
        return received.reshape(1, -1, width)

    spec = P(axes)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)(
        arrays
    )


@partial(jax.jit, static_argnames=("columns", "mesh", "doors"))
def from_hosts(
    pieces: Shaped[Array, "device r width"], *, columns: int, mesh: Mesh, doors: Doors
) -> tuple[Array, ...]:
    """Give every device its rows of each host's array.

    Args:
        pieces: One device's columns after another's, as from `to_hosts`.
        columns: Of each array.
        mesh: The devices.
        doors: Through which matrices pass.

    Returns:
        For each host its array [row, column], its rows spread over the devices.
    """
    axes = axis_names(mesh)

    def local(piece: Array) -> tuple[Array, ...]:
        sent = piece.reshape(mesh.size, -1, piece.shape[2])
        received = lax.all_to_all(sent, axes, split_axis=0, concat_axis=0)
        return tuple(
            jnp.concatenate([received[number] for number in numbers], axis=1)[:, :columns]
            for numbers in doors
        )

    spec = P(axes)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(pieces)


@partial(jax.jit, static_argnames=("mesh", "doors", "start", "stop"))
def rows_to_first(
    array: Shaped[Array, "r *rest"], *, mesh: Mesh, doors: Doors, start: int, stop: int
) -> Shaped[Array, "device step s *rest"]:
    """Give the first host's devices some rows.

    Args:
        array: Its rows are spread over the devices.
        mesh: The devices.
        doors: Through which matrices pass.
        start: The first of the rows.
        stop: One more than the last.

    Returns:
        What each device has received in turn from those that have some of these rows; zeros on
        other hosts.
    """
    axes = axis_names(mesh)
    each = array.shape[0] // mesh.size
    count = min(each, stop - start)
    having = range(start // each, -(-stop // each))

    def local(x: Array) -> Array:
        offset = jnp.clip(start - lax.axis_index(axes) * each, 0, each - count)
        rows = lax.dynamic_slice_in_dim(x, offset, count, axis=0)
        turns = [having[k : k + len(doors[0])] for k in range(0, len(having), len(doors[0]))]
        received = [lax.ppermute(rows, axes, list(zip(turn, doors[0]))) for turn in turns]  # noqa: B905
        return jnp.stack(received)[None]

    spec = P(axes)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(array)


def _offset(number: int, start: int, stop: int, each: int) -> int:
    """From which of its rows on a device sends."""
    return min(max(start - number * each, 0), each - min(each, stop - start))
