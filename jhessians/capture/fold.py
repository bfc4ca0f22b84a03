"""What a fold sees, and what it gives: linears, the batch on its device, terms of a sum.

a: [document, position, in], a linear's input. g: [document, position, out], the loss gradient at
its output.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.capture.site import Site
from jhessians.typing import Array, Float, PyTree, Shaped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a fold may know of the batch on its device.

    Attributes:
        mask: The positions that count, [document, position]; None if all do.
        axes: The mesh axes that rows are sharded over; none on a single device.
        shards: The product of their sizes.
        weight: Of every term; the traversal multiplies by it.
    """

    mask: Any = None
    axes: tuple[str, ...] = field(default=(), metadata={"static": True})
    shards: int = field(default=1, metadata={"static": True})
    weight: float = field(default=1.0, metadata={"static": True})

    def padded(self, rows: int) -> int:
        """`rows` rounded up to a multiple of the shards."""
        return -(-rows // self.shards) * self.shards

    def gather_rows(self, x: Shaped[Array, "local *rest"], rows: int) -> Shaped[Array, "r *rest"]:
        """All `rows` rows of an operand that is sharded by rows."""
        for axis in reversed(self.axes):
            x = lax.all_gather(x, axis, axis=0, tiled=True)
        return x[:rows]

    def scatter_rows(self, x: Float[Array, "r *rest"]) -> Float[Array, "local *rest"]:
        """This device's rows of the sum of `x` over devices."""
        if missing := self.padded(x.shape[0]) - x.shape[0]:
            x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        # One axis in turn: over several at once XLA makes it an all-reduce of the whole array.
        for axis in self.axes:
            x = lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        return x


@runtime_checkable
class Fold(Protocol):
    """A sum over documents of something that (a, g) give. One method, one file.

    A fold is a static argument of jit: make it a frozen dataclass.
    """

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """The statistics of one linear. Every array has rows, which the mesh shards."""
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """What this device's documents add, in the structure of `shapes`.

        Args:
            site: The linear.
            a: [document, position, in], without the column of ones.
            g: [document, position, out].
            operands: Arrays that belong to this linear, such as its eigenvectors, sharded by rows.
            context: Mask and mesh.
        """
        ...


@runtime_checkable
class JointFold(Protocol):
    """A fold to whose rows, one or more for each document, every linear adds its share.

    Its statistic is one for all linears: a function of the rows that are the sums of all shares,
    such as their Gram. While a batch is on its way there are only the rows, and only those of the
    device's own documents.

    Attributes:
        joint: The statistic's name.
    """

    joint: str

    def shapes(self) -> PyTree[jax.ShapeDtypeStruct]:
        """The statistic. Every array has rows, which the mesh shards."""
        ...

    def row_shapes(self, documents: int, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """The rows of a batch on one device."""
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """A linear's share of the rows; arguments as in `Fold.term`."""
        ...

    def finish_rows(self, rows: PyTree[Array]) -> PyTree[Array]:
        """What this device's documents add to the statistic."""
        ...
