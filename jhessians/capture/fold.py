"""What a fold is: a statistic that is summed over documents, computed at every linear.

a: [document, position, in], a linear's input. g: [document, position, out], the loss gradient at
its output. Where one pass calls a linear several times, the positions of all its calls follow one
another, so that a document's gradient is always Σ g aᵀ over its positions.
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
    """What a fold may know about the batch on its device, and about the mesh.

    Attributes:
        mask: The positions that count, [document, position]; None if all do.
        axes: The mesh axes that rows are sharded over; none on a single device.
        shards: How many devices that is: the product of the axes' sizes.
        weight: The factor by which the traversal multiplies every term.
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

    def all_documents(self, x: Shaped[Array, "n *rest"]) -> Shaped[Array, "all *rest"]:
        """`x` of the documents of all devices, in an order that `own_rows` shares."""
        for axis in self.axes:
            x = lax.all_gather(x, axis, axis=0, tiled=True)
        return x

    def own_rows(self, x: Shaped[Array, "n s o"]) -> Shaped[Array, "all s local"]:
        """Of all devices' documents, the features that are this device's rows of a matrix.

        `o` must be a multiple of the shards. Every device then has a part of each document, so that
        a matrix whose rows are sharded meets all documents without being whole anywhere.
        """
        for axis in self.axes:
            x = lax.all_to_all(x, axis, split_axis=2, concat_axis=0, tiled=True)
        return x

    def own_documents(self, x: Float[Array, "all *rest"]) -> Float[Array, "n *rest"]:
        """The sum of `x` over devices, of this device's documents: undoes `all_documents`."""
        for axis in reversed(self.axes):
            x = lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        return x


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matrices:
    """Several matrices of one form as one operand, which is sharded by the matrices' rows.

    Attributes:
        values: [matrix, row, …]; in stacks [member, matrix, row, …].
    """

    values: Any


@runtime_checkable
class Fold(Protocol):
    """A statistic that is a sum over documents, each term a function of a linear's (a, g).

    A fold is a static argument of jit: make it a frozen dataclass. One whose term is a sum over
    positions, without products of different positions, may set `adds_calls = True`: then a linear
    that one pass calls several times adds a term for each call at once, which takes less memory.
    """

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """The shapes of one linear's statistics; the mesh shards each along its first axis."""
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """The sum over this device's documents, in the structure of `shapes`.

        Args:
            site: The linear.
            a: Its input, without the column of ones that stands for the bias.
            g: The loss gradient at its output.
            operands: Arrays that belong to this linear, such as its eigenvectors, sharded by rows.
            context: Mask and mesh.
        """
        ...


@runtime_checkable
class JointFold(Protocol):
    """A fold with one statistic for all linears together, such as a Gram of documents' rows.

    Each document has one or more rows, to which every linear adds its share during the backward
    pass. Once all linears have, the rows give the batch's term. A device keeps the rows of its own
    documents only.

    Attributes:
        joint: The name of the statistic.
    """

    joint: str

    def shapes(self) -> PyTree[jax.ShapeDtypeStruct]:
        """The shapes of the statistic; the mesh shards each array along its first axis."""
        ...

    def row_shapes(self, documents: int, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """The shapes of the rows of one device's part of a batch."""
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """The share that a linear adds to the rows; arguments as in `Fold.term`."""
        ...

    def finish_rows(self, rows: PyTree[Array]) -> PyTree[Array]:
        """The batch's term of the statistic, from the rows of this device's documents."""
        ...
