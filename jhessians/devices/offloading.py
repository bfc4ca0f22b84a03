"""Weights in the host's memory, of which one layer at a time comes to the devices.

The host's memory is pinned, so that the devices read it themselves while they compute. Vectors stay
on the devices: they are small, and a TPU can't cut one out of a stack [layer, d] in host memory.
"""

from typing import Any, TypeVar

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from jhessians.errors import MeshError
from jhessians.typing import Array

HOST = "pinned_host"

Tree = TypeVar("Tree")


def in_host(sharding: Sharding | None) -> Sharding:
    """The sharding of an array that lies in host memory, and is otherwise as another one.

    Args:
        sharding: The other one's; None for JAX's default device.

    Returns:
        The same in the memory of the devices' hosts.

    Raises:
        MeshError: If the devices can't read it.
    """
    found = SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
    device: Any = next(iter(found.addressable_devices))
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise MeshError(
            f"weights can't stay in host memory: {device.device_kind} devices read only "
            f"{' and '.join(kinds)}; leave `offload` out"
        )
    return found.with_memory_kind(HOST)


def is_in_host(array: Array) -> bool:
    """Whether an array lies in host memory, beside devices that have memory of their own."""
    return isinstance(array, jax.Array) and array.sharding.memory_kind == HOST


def may_lie_in_host(shape: tuple[int, ...]) -> bool:
    """Whether a stack's parameter, of this shape, is one of matrices."""
    return len(shape) > 2


def to_device(tree: Tree) -> Tree:
    """The arrays of a tree in the devices' memory; stands inside `jit`."""
    moved: Tree = jax.device_put(tree, jax.memory.Space.Device)
    return moved
