"""Weights that stay spread over the mesh, and of which each use gathers what it needs.

As a rule a module's weights are made whole before it is called (`gather_weights`). A module that
needs only a part at a time, such as one expert's matrix or a slice of the vocabulary, names its
parameters in its attribute `tables`. Inside a pass `weight` then gives the `Shards` of them.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jhessians.typing import Array, Int, Shaped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shards:
    """This device's part of an array that is spread along one axis.

    Attributes:
        part: What the device holds.
        axis: The axis that is spread, counted from the end.
        over: The mesh axes that it is spread over.
    """

    part: Any
    axis: int = field(metadata={"static": True})
    over: tuple[str, ...] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        shape = list(self.part.shape)
        shape[self.axis] *= lax.axis_size(self.over)
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """Number format."""
        return self.part.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def swapaxes(self, first: int, second: int) -> "Shards":
        """The array with its last two axes exchanged, the only ones that may be.

        Args:
            first: -1.
            second: -2.

        Returns:
            Its shards.
        """
        assert (first, second) == (-1, -2) and self.axis in (-1, -2)
        return Shards(self.part.swapaxes(-1, -2), -3 - self.axis, self.over)


def whole(x: Array | Shards) -> Array:
    """The array on every device, gathered from its shards if need be."""
    if not isinstance(x, Shards):
        return x
    axis, part = x.part.ndim + x.axis, x.part
    for mesh_axis in reversed(x.over):
        part = lax.all_gather(part, mesh_axis, axis=axis, tiled=True)
    gathered: Array = part
    return gathered


def rows(x: Shaped[Array, "v d"] | Shards, index: Int[Array, " r"]) -> Shaped[Array, "r d"]:
    """Some rows of a table, the same ones on every device.

    Args:
        x: The table.
        index: Which rows.

    Returns:
        The rows, whole.
    """
    if not isinstance(x, Shards):
        return x[index]
    if x.axis == -1:
        return whole(Shards(x.part[index], -1, x.over))
    # Each row is on one device, to which the others add zeros.
    mine = index - lax.axis_index(x.over) * len(x.part)
    found = x.part[jnp.clip(mine, 0, len(x.part) - 1)]
    found = jnp.where(((mine >= 0) & (mine < len(x.part)))[:, None], found, 0)
    summed: Array = lax.psum(found, x.over)
    return summed


def lookup(x: Shaped[Array, "v d"] | Shards, index: Int[Array, "n s"]) -> Shaped[Array, "n s d"]:
    """Rows of a table, other ones on every device.

    Each device looks up its columns of every device's rows, and then columns are exchanged for
    rows: no more is sent than what is looked up, however many devices there are.

    Args:
        x: The table.
        index: Which rows, for each document and position.

    Returns:
        The rows, whole.
    """
    if not isinstance(x, Shards):
        return x[index]
    if x.axis != -1:
        return whole(x)[index]
    for axis in x.over:
        index = lax.all_gather(index, axis, axis=0, tiled=True)
    found = x.part[index]
    for axis in reversed(x.over):
        found = lax.all_to_all(found, axis, split_axis=0, concat_axis=2, tiled=True)
    exchanged: Array = found
    return exchanged


def weight(variable: nnx.Variable[Any]) -> Any:
    """The array of a parameter; its `Shards` where those were kept for a pass."""
    metadata = variable.get_metadata()
    over = metadata.get("kept_over")
    if not over:
        return variable[...]
    return Shards(variable[...], metadata["kept_axis"], over)


def gather_weights(module: nnx.Module, axes: tuple[str, ...], *, keep_tables: bool = True) -> None:
    """Replace, in place, each sharded parameter by the whole of it.

    A parameter says in its metadata along which axis it is sharded (`jhessians.devices.mesh`).
    Stacks are passed over: their scan gathers one layer at a time.

    Args:
        module: A module merged inside `shard_map`, its arrays this device's shards.
        axes: The mesh axes; none without a mesh.
        keep_tables: Whether what modules name in `tables` stays as it is, to be gathered a part at
            a time.
    """
    if not axes or getattr(module, "scans", False):
        return
    tables = getattr(module, "tables", ()) if keep_tables else ()
    for name, value in vars(module).items():
        if isinstance(value, nnx.Variable) and value.get_metadata().get("sharded_axis"):
            metadata = value.get_metadata()
            axis, over = metadata["sharded_axis"], metadata["sharded_over"]
            # A module that is found twice must not be gathered twice.
            if name in tables:
                kept = value.replace(value[...], sharded_axis=None, kept_axis=axis, kept_over=over)
                setattr(module, name, kept)
            else:
                gathered = whole(Shards(value[...], axis, over))
                setattr(module, name, value.replace(gathered, sharded_axis=None))
    for _, child in nnx.iter_module_children(module):
        gather_weights(child, axes, keep_tables=keep_tables)
