"""Devices: the mesh, how arrays lie on it, and how a host's data gets there.

The same devices share three things: each computes some of the documents, keeps some rows of every
statistic, and with `fsdp` keeps a part of every parameter of the model. Nothing uses one axis of
the mesh alone; it has several only so that each collective operation runs over a short one.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.errors import MeshError
from jhessians.typing import Array, PyTree

SMALLEST_SHARD = 128  # elements of a parameter per device, under which it is copied to all
# Measured: from 16 chips on, XLA turns a reduce-scatter over a flat axis into an all-reduce.
LONGEST_AXIS = 8


def make_mesh(world_size: int | None = None) -> Mesh:
    """A mesh of the first `world_size` devices of all hosts, by default of all.

    Returns:
        One axis; or several, of at most `LONGEST_AXIS` devices each where that is possible.

    Raises:
        MeshError: If there are fewer, or a host would be left without one.
    """
    available = jax.devices()
    count = len(available) if world_size is None else world_size
    if not 1 <= count <= len(available):
        hint = (
            "; virtual ones come from JAX_NUM_CPU_DEVICES=N in the environment"
            if jax.default_backend() == "cpu"
            else ""
        )
        raise MeshError(
            f"`world_size` asks for {count} devices, but JAX sees {len(available)} "
            f"({available[0].platform}); ask for 1 to {len(available)}{hint}"
        )
    if jax.process_count() > 1 and count != len(available):
        raise MeshError(
            f"`world_size` {count} would leave some of the {jax.process_count()} hosts idle; "
            f"with several hosts use all {len(available)} devices"
        )
    shape = _axis_sizes(count)
    names = tuple(f"devices{i}" for i in range(len(shape)))
    return jax.make_mesh(
        shape, names, devices=available[:count],
        axis_types=(jax.sharding.AxisType.Auto,) * len(shape),
    )  # fmt: skip


def _axis_sizes(count: int) -> tuple[int, ...]:
    """`count` as a product of factors up to LONGEST_AXIS, where its divisors allow."""
    sizes = []
    while count > LONGEST_AXIS:
        factor = next((f for f in range(LONGEST_AXIS, 1, -1) if count % f == 0), count)
        sizes.append(factor)
        count //= factor
    return (*sizes, count) if count > 1 or not sizes else tuple(sizes)


def axis_names(mesh: Mesh) -> tuple[str, ...]:
    """All axes, in the order in which they shard rows."""
    return tuple(mesh.axis_names)


def mark_sharded(model: nnx.Module, mesh: Mesh | AbstractMesh, *, stacked: bool = False) -> None:
    """Note in each parameter's metadata along which axis `fsdp` shards it.

    That is the longer one of a matrix's two axes, or the other if the devices don't divide it.
    Vectors and small matrices stay whole. The axis is counted from the end, so that the same number
    is right with and without a stack's layer axis in front.

    Args:
        model: Arrays or shapes.
        mesh: The devices.
        stacked: Whether `model` is a stack's block, whose parameters have a layer axis in front.
    """
    for parameter in vars(model).values():
        if isinstance(parameter, nnx.Param) and mesh.size > 1:
            shape = parameter.shape[stacked:]
            fits = [i for i in (-1, -2) if len(shape) > 1 and shape[i] % mesh.size == 0]
            if fits and math.prod(shape) >= mesh.size * SMALLEST_SHARD:
                parameter.set_metadata(sharded_axis=max(fits, key=lambda i: shape[i]))
    for _, child in nnx.iter_module_children(model):
        mark_sharded(child, mesh, stacked=stacked or getattr(model, "scans", False))


def parameter_specs(state: nnx.State, mesh: Mesh) -> PyTree[P]:
    """One spec per parameter, in the structure of `state`."""

    def spec(variable: Any) -> Any:
        axis = variable.get_metadata().get("sharded_axis")
        if axis is None:
            return variable.replace(P())
        parts: list[Any] = [None] * len(variable.shape)
        parts[axis] = axis_names(mesh)
        return variable.replace(P(*parts))

    return jax.tree.map(spec, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def where_explicit(mesh: Mesh, specs: PyTree[P], arguments: Any) -> Any:
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

    The rows of all hosts together make the global batches. Without a mesh nothing is done.

    Returns:
        Arrays whose axis of documents is sharded over the mesh; without a mesh, what was given.
    """
    if mesh is None:
        return batches
    sharding = NamedSharding(mesh, P(None, axis_names(mesh)))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batches
    )


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
