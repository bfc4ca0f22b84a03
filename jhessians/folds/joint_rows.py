"""Rows to which all modules add: the projection of a whole gradient, of a document or a token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.folds.gram import JointGram
from jhessians.folds.rows import GradientRows
from jhessians.typing import Array, Float, PyTree


@dataclass(frozen=True)
class JointRows:
    """One row of a document, or one of each of its positions; that of which `JointGram` sums Grams.

    Attributes:
        rows: Makes each module's share; must have a projection.
    """

    rows: GradientRows

    def joint_shapes(self, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """The row of one document, [p], or those of its tokens, [position, p]."""
        assert self.rows.projection is not None
        tokens = (positions,) if self.rows.tokens else ()
        return jax.ShapeDtypeStruct((*tokens, self.rows.projection.dimension), self.rows.dtype)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `JointDocumentFold.document_rows`."""
        return JointGram(self.rows).term(site, a, g, operands, context)
