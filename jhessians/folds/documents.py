"""What there is of every document: its gradient, or the square of its length.

G_n = Σ g aᵀ over the positions of document n that count, [out, in], with the bias's column last
where it counts; for `jhessians.map_documents`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.folds.covariance import masked, with_ones
from jhessians.typing import Array, DTypeLike, Float, PyTree


@dataclass(frozen=True)
class DocumentGradients:
    """Every document's gradient, [document, out, in].

    Attributes:
        dtype: Number format of the gradients.
    """

    dtype: DTypeLike = jnp.float32

    def document_shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """One gradient, [O, I']."""
        return jax.ShapeDtypeStruct((site.out_features, site.inputs), self.dtype)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """The batch's gradients; see `DocumentFold.document_rows`."""
        a = masked(with_ones(a, site), context).astype(self.dtype)
        return jnp.einsum("nso,nsi->noi", g.astype(self.dtype), a)


@dataclass(frozen=True)
class DocumentSquaredNorms:
    """Every document's Σ G², the square of its gradient's length, [document].

    Attributes:
        dtype: Number format of products and sums.
    """

    dtype: DTypeLike = jnp.float32

    def document_shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """One number."""
        return jax.ShapeDtypeStruct((), self.dtype)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """The batch's squares; see `DocumentFold.document_rows`."""
        a = masked(with_ones(a, site), context).astype(self.dtype)

        # One document at a time: their gradients together may be large.
        def of_document(document: tuple[Array, Array]) -> Array:
            a_si, g_so = document
            return jnp.square(g_so.T @ a_si).sum()

        return lax.map(of_document, (a, g.astype(self.dtype)))
