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
from jhessians.devices.tiles import padded_share
from jhessians.typing import Array, Float, PyTree, Shaped

MOST_FILLED = 1.1
"""How many times the arithmetic it may cost to fill up a device's rows of a product."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a fold may know about the batch on its device, and about the mesh.

    Attributes:
        mask: The positions that count, [document, position]; None if all do.
        axes: The mesh axes that rows are sharded over; none on a single device.
        shards: How many devices that is: the product of the axes' sizes.
        tiled: Whether the devices are TPUs, which keep arrays in tiles.
        weight: The factor by which the traversal multiplies every term.
    """

    mask: Any = None
    axes: tuple[str, ...] = field(default=(), metadata={"static": True})
    shards: int = field(default=1, metadata={"static": True})
    tiled: bool = field(default=False, metadata={"static": True})
    weight: float = field(default=1.0, metadata={"static": True})

    def padded(self, rows: int) -> int:
        """`rows` rounded up to a multiple of the shards."""
        return -(-rows // self.shards) * self.shards

    def gather_rows(self, x: Shaped[Array, "local *rest"], rows: int) -> Shaped[Array, "r *rest"]:
        """All rows of an operand that is sharded by rows.

        Args:
            x: This device's rows.
            rows: How many there are on all devices, without those that pad them.

        Returns:
            The whole array, on every device.
        """
        for axis in reversed(self.axes):
            x = lax.all_gather(x, axis, axis=0, tiled=True)
        return x[:rows]

    def filled_share(self, rows: int, columns: int) -> tuple[int, int]:
        """To what a device's rows of a product are filled up in its operands, which costs less.

        Args:
            rows: Of float32, as all sums on TPUs are.
            columns: Likewise.

        Returns:
            Whole tiles that `scatter_rows` need not fill up; what was given, where that is too far.
        """
        sizes = tuple(lax.axis_size(axis) for axis in self.axes)
        more, wider = padded_share((rows, columns), sizes)
        more += -more % 8
        return (
            more if more <= MOST_FILLED * rows else rows,
            wider if wider <= MOST_FILLED * columns else columns,
        )

    def scatter_rows(
        self, x: Float[Array, "r *rest"], kept: tuple[int, ...] | None = None
    ) -> Float[Array, "local *rest2"]:
        """This device's rows of the sum of `x` over devices.

        Args:
            x: What this device adds to all rows.
            kept: The shape of a device's rows, if `x` is filled up beyond that.

        Returns:
            As many rows on each device: they are padded with zeros to a multiple of the devices.
        """
        if missing := self.padded(x.shape[0]) - x.shape[0]:
            x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        # One mesh axis in turn, each along an axis of its own: over several at once, or along rows
        # whose shares aren't whole tiles, XLA adds up all rows on every TPU.
        sizes = tuple(lax.axis_size(axis) for axis in self.axes)
        x = x.reshape(*sizes, -1, *x.shape[1:])
        share = x.shape[len(sizes) :]
        if self.tiled and len(share) == 2:
            padded = padded_share(share, sizes, x.dtype.itemsize)
            more = [(0, new - old) for new, old in zip(padded, share, strict=True)]
            x = jnp.pad(x, [(0, 0)] * len(sizes) + more)
        for axis in self.axes:
            x = lax.psum_scatter(x, axis, scatter_dimension=0)
        return x[tuple(slice(n) for n in kept or share)]

    def all_documents(self, x: Shaped[Array, "n *rest"]) -> Shaped[Array, "all *rest"]:
        """Gather what the devices have of their documents.

        Args:
            x: Of this device's documents.

        Returns:
            Of the documents of all devices, in the order in which `own_rows` has them too.
        """
        for axis in self.axes:
            x = lax.all_gather(x, axis, axis=0, tiled=True)
        return x

    def own_rows(self, x: Shaped[Array, "n s o"]) -> Shaped[Array, "all s local"]:
        """Exchange documents for features: those that are this device's rows of a matrix.

        Every device then has a part of each document, so that a matrix whose rows are sharded meets
        all documents without being whole anywhere.

        Args:
            x: All features of this device's documents; how many must be a multiple of the shards.

        Returns:
            This device's features of all devices' documents.
        """
        for axis in self.axes:
            x = lax.all_to_all(x, axis, split_axis=2, concat_axis=0, tiled=True)
        return x

    def own_documents(self, x: Float[Array, "all *rest"]) -> Float[Array, "n *rest"]:
        """Sum over devices, and keep the sums of this device's documents.

        Args:
            x: What this device adds to each of all devices' documents, in the order of
                `all_documents`.

        Returns:
            The sums of this device's documents, in the order in which it had them.
        """
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
        """The shapes of one linear's statistics.

        Args:
            site: The linear; in a stack, one of its linears.

        Returns:
            A pytree of `jax.ShapeDtypeStruct`, each with at least one axis and a floating type, in
            which sums are kept unless a pass asks for another. The mesh shards each array along its
            first axis.
        """
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """What the documents of one device add to one linear's statistics.

        Args:
            site: The linear.
            a: [document, position, in], its input, without the column of ones for the bias.
            g: [document, position, out], the loss gradient at its output.
            operands: Arrays that belong to this linear, such as its eigenvectors, by name; sharded
                by rows, of which `context.gather_rows` makes whole arrays.
            context: Mask and mesh. Positions that the mask leaves out must add nothing.

        Returns:
            The sum over these documents, with the structure and the shapes of `shapes`. The
            traversal adds it up over devices.
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
        """The shapes of the one statistic.

        Returns:
            A pytree of `jax.ShapeDtypeStruct`, each with at least one axis and a floating type. The
            mesh shards each array along its first axis.
        """
        ...

    def row_shapes(self, documents: int, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """The shapes of the rows of one device's part of a batch.

        Args:
            documents: How many documents that part has.
            positions: How many positions they are padded to.

        Returns:
            A pytree of `jax.ShapeDtypeStruct`, as a rule [document, …].
        """
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """The share that one linear adds to the rows.

        Arguments are those of `Fold.term`.

        Returns:
            Arrays with the structure and the shapes of `row_shapes`.
        """
        ...

    def finish_rows(self, rows: PyTree[Array]) -> PyTree[Array]:
        """What the documents of one device add to the statistic.

        Args:
            rows: Their rows, to which all linears have added.

        Returns:
            Arrays with the structure and the shapes of `shapes`.
        """
        ...
