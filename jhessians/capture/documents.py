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
        """What there is of one document at one linear; a shape () stands for a single number."""
        ...

    def document_rows(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """The documents' rows, [document, …], in the structure of `document_shapes`.

        Args:
            site: The linear.
            a: [document, position, in], without the column of ones.
            g: [document, position, out].
            operands: Arrays that belong to this linear, sharded by rows.
            context: Mask and mesh. A document all of whose positions are masked gets zeros.
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
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.documents, *x.shape), x.dtype),
            self.fold.document_shapes(site),
        )

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        return self.fold.document_rows(site, a, g, operands, context)


@runtime_checkable
class JointDocumentFold(Protocol):
    """Something that every document has once, to which each linear adds its share: a score."""

    def joint_shapes(self, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """What there is of one document of so many positions."""
        ...

    def document_rows(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """What a linear adds to the rows, [document, …]; arguments as in `DocumentFold`."""
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
        return self.row_shapes(self.documents, self.positions)

    def row_shapes(self, documents: int, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((documents, *x.shape), x.dtype),
            self.fold.joint_shapes(positions),
        )

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        return self.fold.document_rows(site, a, g, operands, context)

    def finish_rows(self, rows: PyTree[Array]) -> PyTree[Array]:
        return rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DocumentContext(Context):
    """The context of folds that sum nothing: each device keeps the rows of its own documents."""

    def scatter_rows(self, x: Float[Array, "r *rest"]) -> Float[Array, "r *rest"]:
        return x
