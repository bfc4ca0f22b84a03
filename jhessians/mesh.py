"""Devices: the mesh, how arrays lie on it, and how a host's data gets there.

One set of devices serves three purposes at once: documents are spread over it, rows of statistics
are sharded over it, and with `fsdp` so are the model's parameters. All of its axes always act
together; there are several only so that each collective runs over a short one.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.errors import MeshError, UserError
from jhessians.typing import Array, PyTree

SMALLEST_SHARD = 128  # elements of a parameter per device, under which it is copied to all
# Measured: from 16 chips on, XLA turns a reduce-scatter over a flat axis into an all-reduce.
LONGEST_AXIS = 8


def start_hosts() -> None:
    """Join the other hosts of this run, if the environment names a coordinator.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say where, of how
    many, and which one this is; on TPU pods and under SLURM the address alone is enough.

    Raises:
        MeshError: If they make no sense, or the others don't come within five minutes.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address or jax.distributed.is_initialized():
        return
    count, index = (_whole_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    # Its handler of SIGTERM would take the place of ours, and end nothing.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(address, count, index)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MeshError(
            f"process {index} of {count} cannot join the others at {address}: {reason}; check "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _whole_number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise MeshError(f"{name} is {value!r}; expected a whole number")
    return None if value is None else int(value)


@contextmanager
def together() -> Iterator[None]:
    """What fails on one host in the block fails on all, so that none waits for it for ever.

    Raises:
        UserError: On the hosts that did not fail: of the kind, and with the message, of the first
            one that did.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        line = "" if failure is None else f"{type(failure).__name__}:{failure}"
        for host, (kind, _, message) in enumerate(x.partition(":") for x in _everyones(line)):
            if kind and failure is None:
                kinds = {each.__name__: each for each in UserError.__subclasses__()}
                raise kinds.get(kind, UserError)(f"process {host} failed: {message}")
    if failure is not None:
        raise failure


def require_same(what: str, *values: Any) -> None:
    """Check that all hosts have equal values, before they set out to compute together.

    Args:
        what: For the message, in the plural.
        values: Arrays, or objects whose `repr` tells them apart.

    Raises:
        MeshError: On every host, if one differs.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    if len(set(_everyones(digest.hexdigest()))) > 1:
        raise MeshError(
            f"{what} differ between the {jax.process_count()} processes of this run; give all of "
            "them the same command and the same files"
        )


def _everyones(line: str, length: int = 1024) -> list[str]:
    """The line of every process, cut at `length` bytes."""
    from jax.experimental import multihost_utils

    buffer = np.zeros(length, np.uint8)
    encoded = line.encode()[:length]
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = multihost_utils.process_allgather(buffer)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` devices of all hosts, by default of all.

    Raises:
        MeshError: If there are fewer, or a host would be left without one.
    """
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        hint = (
            "; virtual ones come from XLA_FLAGS=--xla_force_host_platform_device_count=N"
            if jax.default_backend() == "cpu"
            else ""
        )
        raise MeshError(
            f"--world_size asks for {count} devices, but JAX sees {len(available)} "
            f"({available[0].platform}); ask for 1 to {len(available)}{hint}"
        )
    if jax.process_count() > 1 and count != len(available):
        raise MeshError(
            f"--world_size {count} would leave some of the {jax.process_count()} hosts idle; "
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


def mark_sharded(model: nnx.Module, mesh: Mesh, *, stacked: bool = False) -> None:
    """Note in each parameter's metadata along which axis `fsdp` shards it.

    The axis is counted from the end, so that it holds with and without a stack's layer axis: the
    longer of a matrix's two that the devices divide. Vectors and small matrices stay whole.

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


def put_batches(batches: PyTree[np.ndarray], mesh: Mesh | None) -> PyTree[Array]:
    """Spread this host's rows of stacked batches [batch, document, ...] over its devices.

    Together they are the global batches. Without a mesh they are left as they are.
    """
    if mesh is None:
        return batches
    sharding = NamedSharding(mesh, P(None, axis_names(mesh)))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batches
    )


def in_host_memory(array: Array) -> Any:
    """The array, as numpy where it lies in the host's memory anyway, in one piece.

    So what is cut out of it is a view, and nothing is compiled to cut it out.
    """
    if isinstance(array, jax.Array) and array.is_fully_addressable and len(array.devices()) == 1:
        (device,) = array.devices()
        return np.asarray(array) if device.platform == "cpu" else array
    return array


def fetch(array: Array, index: Callable[[Array], Array] = lambda x: x) -> np.ndarray:
    """Bring `index(array)` to every host as numpy."""
    part = index(in_host_memory(array))
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    return np.asarray(part)
