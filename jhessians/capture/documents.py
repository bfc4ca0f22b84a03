"""Folds that give a row for every document, and how the traversal keeps those rows apart.

A sum lies on the mesh by its own rows, so each linear's term is summed over all devices. A row for
a document belongs to the device that has the document, and to no other. All else is the same: the
rows are statistics with a document axis, to which a linear adds what it knows of each document.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.typing import Array, Float, PyTree


@runtime_checkable
class DocumentFold(Protocol):
    """Something that (a, g) give for every document, such as its gradient; nothing is summed.

    `jhessians.map_documents` runs it. Like a `Fold` it is a static argument of jit: make it a
    frozen dataclass.
    """

    def document_shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """The shapes of what there is of one document at one linear.

        Args:
            site: The linear; in a stack, one of its linears.

        Returns:
            A `jax.ShapeDtypeStruct`, or a pytree of some, without a document axis; the shape () is
            that of a single number.
        """
        ...

    def document_rows(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """The rows of this device's documents.

        Args:
            site: The linear.
            a: [document, position, in], its input, without the column of ones for the bias.
            g: [document, position, out], the loss gradient at its output.
            operands: Arrays that belong to this linear, by name, sharded by rows.
            context: Mask and mesh.

        Returns:
            [document, …] in the structure of `document_shapes`. A document all of whose positions
            are masked gets zeros.
        """
        ...


@dataclass(frozen=True)
class PerDocument:
    """A `DocumentFold` as a fold whose statistics are the rows of one batch.

    Attributes:
        fold: What there is of each document.
        documents: How many documents a batch has, on all devices together.
    """

    fold: DocumentFold
    documents: int

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """The shapes of one document, each with a leading axis of the batch's documents."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.documents, *x.shape), x.dtype),
            self.fold.document_shapes(site),
        )

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """The documents' rows, as `DocumentFold.document_rows` gives them."""
        return self.fold.document_rows(site, a, g, operands, context)


@runtime_checkable
class JointDocumentFold(Protocol):
    """Something that every document has once, to which each linear adds its share: a score."""

    def joint_shapes(self, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """The shapes of what there is of one document, of all linears together.

        Args:
            positions: How many positions the batch's documents are padded to.

        Returns:
            A `jax.ShapeDtypeStruct`, or a pytree of some, without a document axis.
        """
        ...

    def document_rows(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """What one linear adds to the rows of this device's documents.

        Arguments are those of `DocumentFold.document_rows`.

        Returns:
            [document, …] in the structure of `joint_shapes`.
        """
        ...


@dataclass(frozen=True)
class PerDocumentJointly:
    """A `JointDocumentFold` as a joint fold whose statistic is the rows of one batch.

    Attributes:
        fold: What there is of each document.
        documents: How many documents a batch has, on all devices together.
        positions: How many positions they are padded to.
    """

    fold: JointDocumentFold
    documents: int
    positions: int
    joint = "documents"

    def shapes(self) -> PyTree[jax.ShapeDtypeStruct]:
        """See `JointFold.shapes`: here the rows of a whole batch."""
        return self.row_shapes(self.documents, self.positions)

    def row_shapes(self, documents: int, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """See `JointFold.row_shapes`."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((documents, *x.shape), x.dtype),
            self.fold.joint_shapes(positions),
        )

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """See `JointFold.term`."""
        return self.fold.document_rows(site, a, g, operands, context)

    def finish_rows(self, rows: PyTree[Array]) -> PyTree[Array]:
        """The rows themselves, which are the statistic."""
        return rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DocumentContext(Context):
    """The context of folds that sum nothing: each device keeps the rows of its own documents."""

    def scatter_rows(
        self, x: Float[Array, "r *rest"], kept: tuple[int, ...] | None = None
    ) -> Float[Array, "r *rest"]:
        """`x` itself: the rows of this device's documents, which no other device adds to."""
        return x
