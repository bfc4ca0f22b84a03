"""Gradients of tokens as rows, position by position: nothing is summed, not even over a document.

The row of position t is vec(g_t a_tᵀ), normalised and projected as `jhessians.folds.rows` says; a
document's rows add up to its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.folds.rows import GradientRows
from jhessians.typing import Array, Float, PyTree


@dataclass(frozen=True)
class TokenRows:
    """A row for every position of every document; zeros where a position doesn't count.

    Attributes:
        rows: Makes the rows, of tokens; a site's operands are those that it asks for.
        positions: How many positions the documents are padded to.
    """

    rows: GradientRows
    positions: int

    def document_shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """The rows of one document, [position, d], or [position, head, d] of a split module."""
        heads = (self.rows.heads,) if site.name in self.rows.split else ()
        shape = (self.positions, *heads, self.rows.unit_size(site))
        return jax.ShapeDtypeStruct(shape, self.rows.dtype)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `DocumentFold.document_rows`."""
        u, v, factor = self.rows.factors(site, a, g, operands, context)
        keys = self.rows.unit_keys(site, operands, context, count=2)
        rows = jax.vmap(self.rows.of_unit, in_axes=(0, None, 0, 0), out_axes=2)(u, v, factor, keys)
        return rows.reshape(len(rows), *self.document_shapes(site).shape)
