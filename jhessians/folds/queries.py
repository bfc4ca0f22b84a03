"""Queries: documents' gradients after the inverse Hessian, whole or as products of low rank.

P_n = Q_S (multiplier ∘ Q_Sᵀ G_n Q_A) Q_Aᵀ, [out, in]; without a Hessian P_n = G_n. A device
computes those of its own documents, and has one linear's eigenvectors whole at a time.
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
from jhessians.folds.scores import rotated_gradients
from jhessians.linalg.inverse import out_of_eigenbasis
from jhessians.linalg.low_rank import truncate
from jhessians.typing import Array, DTypeLike, Float, PyTree


@dataclass(frozen=True)
class Queries:
    """Each document's P, and the squares of the lengths that go with it.

    A site's operands are those of `SelfInfluence`, none without a Hessian.

    Attributes:
        curvature: Whether there is a Hessian.
        rank: How many outer products are kept of each P, the largest ones; None for all of it.
        dtype: Number format of products and results.
    """

    curvature: bool = True
    rank: int | None = None
    dtype: DTypeLike = jnp.float32

    def document_shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """See `DocumentFold.document_shapes`.

        Args:
            site: The linear.

        Returns:
            `matrix` P [out, in], or `left` [rank, out] and `right` [rank, in] whose products add up
            to about P; `self`, gᵀ H⁻¹ g; `square`, the sum of P's squares, and `kept`, that of what
            is kept of it.
        """
        o, i = site.out_features, site.inputs
        shapes: dict[str, tuple[int, ...]] = {"self": (), "square": (), "kept": ()}
        if self.rank is None:
            shapes["matrix"] = (o, i)
        else:
            shapes |= {"left": (self.rank, o), "right": (self.rank, i)}
        return {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in shapes.items()}

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `DocumentFold.document_rows`."""
        a = with_ones(a, site).astype(self.dtype)
        g = masked(g, context).astype(self.dtype)
        if self.curvature:
            q_a = context.gather_rows(operands["activation"], site.inputs).astype(self.dtype)
            q_s = context.gather_rows(operands["gradient"], site.out_features).astype(self.dtype)
            multiplier = context.gather_rows(operands["multiplier"], site.out_features)
            coefficients = rotated_gradients(site, a, g, operands, context)
            scaled = multiplier.astype(self.dtype)[None] * coefficients
            own = (coefficients * scaled).sum((1, 2))
            matrix = out_of_eigenbasis(scaled, q_s, q_a)
        else:
            matrix = jnp.einsum("nso,nsi->noi", g, a)
            own = jnp.square(matrix).sum((1, 2))
        square = jnp.square(matrix).sum((1, 2))
        rows = {"self": own, "square": square}
        if self.rank is None:
            return rows | {"matrix": matrix, "kept": square}
        rank = self.rank
        left, right = lax.map(lambda m: truncate(m, rank), matrix)
        return rows | {"left": left, "right": right, "kept": jnp.square(right).sum((1, 2))}
