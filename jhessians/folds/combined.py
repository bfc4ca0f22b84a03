"""Folds of documents' rows put together in one pass, or kept apart by linear."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jhessians.capture.documents import JointDocumentFold
from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.typing import Array, Float, PyTree


@dataclass(frozen=True)
class Several:
    """Several folds of one pass, each with its name.

    Attributes:
        folds: Names and folds.
    """

    folds: tuple[tuple[str, JointDocumentFold], ...]

    def joint_shapes(self, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """See `JointDocumentFold.joint_shapes`."""
        return {name: fold.joint_shapes(positions) for name, fold in self.folds}

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `JointDocumentFold.document_rows`."""
        return {
            name: fold.document_rows(site, a, g, operands, context) for name, fold in self.folds
        }


@dataclass(frozen=True)
class ByLinear:
    """What a joint fold's linears would add up, kept apart by linear.

    Attributes:
        fold: Its rows must not depend on the number of positions.
    """

    fold: JointDocumentFold

    def document_shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """See `DocumentFold.document_shapes`."""
        return self.fold.joint_shapes(0)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `DocumentFold.document_rows`."""
        return self.fold.document_rows(site, a, g, operands, context)
