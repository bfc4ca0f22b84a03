"""Devices: the mesh, how arrays lie on it, and how a host's data gets there.

The same devices share three things: each computes some of the documents, keeps some rows of every
statistic, and with `fsdp` keeps a part of every parameter of the model. Documents and rows are
spread over all axes of the mesh; it has several only so that each collective operation runs over a
short one. Weights are spread over all axes too, or over those named `fsdp` where there are some.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.devices.axes import parse_axes, short_factors, size_of
from jhessians.errors import MeshError
from jhessians.typing import Array, PyTree

SMALLEST_SHARD = 128  # elements of a parameter per device, under which it is copied to all
if TYPE_CHECKING:  # all that computes needs devices
    AnyMesh: TypeAlias = Mesh
else:
    AnyMesh = Mesh | AbstractMesh
"""Devices; or only how many there are along each axis, which is enough to trace a computation."""

LONGEST_OF_OTHERS = 8
"""Devices along an axis of what isn't a TPU: a machine's GPUs, as a rule."""


def make_mesh(
    world_size: int | None = None,
    *,
    axes: str | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of the first `world_size` devices of all hosts, by default of all.

    Args:
        world_size: How many devices; by default as many as `axes` say, which must then be all.
        axes: Sizes and names of the axes, as `jhessians.devices.axes.parse_axes` reads them; by
            default they follow from how the devices are wired, and are short.
        devices: The devices that there are, such as those of a topology; default JAX's.

    Returns:
        One axis or several.

    Raises:
        MeshError: If there are fewer devices, a host would be left without one, or the axes can't
            be read or don't multiply out.
    """
    available = list(jax.devices() if devices is None else devices)
    sizes = None if axes is None else parse_axes(axes)
    count = len(available) if world_size is None else world_size
    if not 1 <= count <= len(available):
        hint = (
            "; virtual ones come from JAX_NUM_CPU_DEVICES=N in the environment"
            if available[0].platform == "cpu"
            else ""
        )
        raise MeshError(
            f"`world_size` asks for {count} devices, but JAX sees {len(available)} "
            f"({available[0].platform}); ask for 1 to {len(available)}{hint}"
        )
    if devices is None and jax.process_count() > 1 and count != len(available):
        raise MeshError(
            f"`world_size` {count} would leave some of the {jax.process_count()} hosts idle; "
            f"with several hosts use all {len(available)} devices"
        )
    if sizes is not None and size_of(sizes) != count:
        there = f"there are {count}" if world_size is None else f"`world_size` is {count}"
        raise MeshError(
            f"`mesh` {axes} is of {size_of(sizes)} devices, but {there}; give sizes that multiply "
            f"to {count}"
            + ("" if size_of(sizes) > count else f", or `world_size` {size_of(sizes)}")
        )
    grid = _wired(available[:count])
    if sizes is None:
        grid = _short_axes(grid)
        sizes = {f"devices{i}": size for i, size in enumerate(grid.shape)}
    shape = tuple(sizes.values())
    return Mesh(grid.reshape(shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def _wired(devices: list[Any]) -> np.ndarray:
    """Devices as the grid that they are wired in; those that are none of TPUs', in a line.

    Returns:
        An array of devices, with an axis for each that the grid has; slices of a pod, which are not
        wired to one another, come last.
    """
    line = np.empty(len(devices), object)
    line[:] = devices
    if any(each.platform != "tpu" for each in devices):
        return line
    places = np.array([
        [*each.coords, getattr(each, "core_on_chip", 0), getattr(each, "slice_index", 0) or 0]
        for each in devices
    ])  # fmt: skip
    places -= places.min(0)
    shape = places.max(0) + 1
    if shape.prod() != len(devices) or len(np.unique(places, axis=0)) != len(devices):
        return line
    grid = np.empty(shape, object)
    for place, each in zip(places, devices, strict=True):
        grid[tuple(place)] = each
    return grid.squeeze() if len(devices) > 1 else grid.reshape(1)


def _short_axes(grid: np.ndarray) -> np.ndarray:
    """The same devices with every axis divided into short ones.

    Returns:
        A grid whose first axes are of neighbours: sums are spread over these first, when they are
        largest.
    """
    tpu = grid.flat[0].platform == "tpu"
    if not tpu:
        return grid.reshape(short_factors(grid.size, LONGEST_OF_OTHERS) or (1,))
    if grid.size == 1:
        return grid.reshape(1)
    factors = [short_factors(size)[::-1] for size in grid.shape]
    divided = grid.reshape([size for each in factors for size in each])
    # Axis by axis, how far its devices are from being neighbours.
    distance = [len(each) - 1 - i for each in factors for i in range(len(each))]
    return divided.transpose(np.argsort(distance, kind="stable"))


def axis_names(mesh: AnyMesh) -> tuple[str, ...]:
    """All axes, in the order in which they shard rows."""
    return tuple(mesh.axis_names)


def platform_of(mesh: AnyMesh | None) -> str:
    """Of the mesh's devices, or of the one that JAX takes by default: cpu, tpu, cuda or rocm."""
    if isinstance(mesh, AbstractMesh):
        return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def weight_axes(mesh: AnyMesh) -> tuple[str, ...]:
    """The axes over which `fsdp` spreads weights: those named fsdp…, or all if none is."""
    names = axis_names(mesh)
    return tuple(name for name in names if name.startswith("fsdp")) or names


def mark_sharded(model: nnx.Module, mesh: AnyMesh, *, stacked: bool = False) -> None:
    """Note in each parameter's metadata along which axis `fsdp` shards it, over which of the mesh.

    That is the longer one of a matrix's two axes, or the other if the devices don't divide it; the
    last one of a table of which slices are gathered (`jhessians.capture.shards`). If the devices
    divide none, those of the first axes of the mesh may. Vectors and small matrices stay whole. The
    axis is counted from the end, so that the same number is right with and without a stack's layer
    axis in front.

    Args:
        model: Arrays or shapes.
        mesh: The devices.
        stacked: Whether `model` is a stack's block, whose parameters have a layer axis in front.
    """
    axes = weight_axes(mesh)
    for name, parameter in vars(model).items():
        if isinstance(parameter, nnx.Param) and mesh.size > 1:
            shape = parameter.shape[stacked:]
            candidates = (-1, -2) if len(shape) > 1 else ()
            found = None
            if name in getattr(model, "tables", ()):
                found = _spread(mesh, axes, shape, candidates[:1])
            axis, over = found or _spread(mesh, axes, shape, candidates) or (None, ())
            if axis is not None:
                parameter.set_metadata(sharded_axis=axis, sharded_over=over)
    for _, child in nnx.iter_module_children(model):
        mark_sharded(child, mesh, stacked=stacked or getattr(model, "scans", False))


def _spread(
    mesh: AnyMesh,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    candidates: Sequence[int],
) -> tuple[int, tuple[str, ...]] | None:
    """Which of an array's axes to spread, and over how many of the mesh's: as many as can be."""
    for count in range(len(axes), 0, -1):
        devices = math.prod(mesh.shape[name] for name in axes[:count])
        fits = [i for i in candidates if shape[i] % devices == 0]
        if devices > 1 and fits and math.prod(shape) >= devices * SMALLEST_SHARD:
            return max(fits, key=lambda i: shape[i]), axes[:count]
    return None


def parameter_specs(state: nnx.State, mesh: AnyMesh) -> PyTree[P]:
    """One spec per parameter, in the structure of `state`."""

    def spec(variable: Any) -> Any:
        metadata = variable.get_metadata()
        axis = metadata.get("sharded_axis")
        if axis is None:
            return variable.replace(P())
        parts: list[Any] = [None] * len(variable.shape)
        parts[axis] = metadata["sharded_over"]
        return variable.replace(P(*parts))

    return jax.tree.map(spec, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def parameter_shapes_on(state: nnx.State, mesh: AnyMesh | None) -> nnx.State:
    """The shapes among a model's variables, with shardings where they have none; arrays as is.

    Args:
        state: Of arrays, or of `jax.ShapeDtypeStruct`s.
        mesh: The devices; None for a single one, which needs no sharding.

    Returns:
        A state that a `jit` can be lowered for.
    """
    if mesh is None:
        return state
    return jax.tree.map(
        lambda x, spec: x
        if not isinstance(x, jax.ShapeDtypeStruct) or x.sharding is not None
        else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        state, parameter_specs(state, mesh),
    )  # fmt: skip


def where_explicit(mesh: AnyMesh, specs: PyTree[P], arguments: Any) -> Any:
    """Move the arguments of a `shard_map` where the mesh's axes are explicit: JAX won't do it.

    Args:
        mesh: The devices.
        specs: A spec in the place of each argument, or of a tree of arguments.
        arguments: Arrays.

    Returns:
        The arguments, sharded by their specs; as they were, where JAX moves them itself.
    """
    if AxisType.Explicit not in mesh.axis_types:
        return arguments
    return jax.tree.map(
        lambda spec, tree: jax.device_put(tree, NamedSharding(mesh, spec)),
        specs, arguments, is_leaf=lambda x: isinstance(x, P),
    )  # fmt: skip


def put_batches(batches: PyTree[np.ndarray], mesh: Mesh | None) -> PyTree[Any]:
    """Spread this host's rows of stacked batches [batch, document, ...] over its devices.

    The rows of all hosts together make the global batches. Without a mesh nothing is done. Shapes
    stand for the global batches.

    Returns:
        Arrays, or shapes, whose axis of documents is sharded over the mesh; without a mesh, what
        was given.
    """
    if mesh is None:
        return batches
    sharding = NamedSharding(mesh, P(None, axis_names(mesh)))

    def put(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(put, batches)


def in_host_memory(array: Array) -> Any:
    """The array as numpy, without a copy, if it is one piece in the host's memory already.

    A slice of it is then a view, and XLA compiles nothing to make one.

    Returns:
        A view as numpy; or the array as it was, where numpy would have to copy it.
    """
    if isinstance(array, jax.Array) and array.is_fully_addressable and len(array.devices()) == 1:
        (device,) = array.devices()
        return np.asarray(array) if device.platform == "cpu" else array
    return array
