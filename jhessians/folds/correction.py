"""Eigenvalue correction of EKFAC: Λ = Σ_n (Q_Sᵀ G_n Q_A)², elementwise, over documents n.

G_n = Σ g aᵀ over the document's positions. George et al. 2018, arXiv:1806.03884; equation 20 of
arXiv:2308.03296.
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
class EigenvalueCorrection:
    """Squares of the documents' gradients in a Kronecker-factored eigenbasis.

    A site's operands are `activation`, its Q_A, which sites with the same input share, and
    `gradient`, its Q_S. Columns are eigenvectors.

    Attributes:
        dtype: Number format of the rotations and of the running sum.
    """

    dtype: DTypeLike = jnp.float32

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """[O, I'], a sum for each eigenvector; see `Fold.shapes`."""
        return jax.ShapeDtypeStruct((site.out_features, site.inputs), self.dtype)

    def term(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """Σ_n (Q_Sᵀ G_n Q_A)² of these documents; see `Fold.term`."""
        q_a = context.gather_rows(operands["activation"], site.inputs)
        q_s = context.gather_rows(operands["gradient"], site.out_features)
        # Masking one of the two is enough. XLA merges most masks of `a` into recomputing it.
        a = masked(with_ones(a, site), context).astype(self.dtype)
        g = g.astype(self.dtype)
        positions = a.shape[1]

        # Either rotate the positions' vectors, or form the document's gradient and rotate that,
        # whichever is less arithmetic: S·I² against O·I², and S·O² against O²·I. If both are the
        # same, rotating vectors is faster: one large product instead of one for each document.
        vectors_first_a = positions <= site.out_features
        vectors_first_g = positions <= site.inputs
        if vectors_first_a:
            a = a @ q_a
        if vectors_first_g:
            g = g @ q_s

        # A scan over documents: faster and leaner than one product with a document axis.
        def add(total: Array, document: tuple[Array, Array]) -> tuple[Array, None]:
            a_si, g_so = document
            gradient = g_so.T @ a_si
            if not vectors_first_g:
                gradient = q_s.T @ gradient
            if not vectors_first_a:
                gradient = gradient @ q_a
            return total + jnp.square(gradient), None

        zeros = jnp.zeros((site.out_features, site.inputs), self.dtype)
        return lax.scan(add, zeros, (a, g))[0]
