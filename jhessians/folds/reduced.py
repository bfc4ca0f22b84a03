"""Reduced Kronecker factors: A = Σ ā āᵀ and S = Σ ĝ ĝᵀ over documents.

ā is the mean of a document's inputs over the positions that count, ĝ the sum of its gradients: the
"reduce" setting for weights that positions share, Eschenhagen et al. 2023, arXiv:2311.00636.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.folds.covariance import (
    FactorFold,
    factor_shapes,
    masked,
    two_digits,
    with_ones,
)
from jhessians.linalg.symmetric import packed_gram
from jhessians.typing import Array, DTypeLike, Float, PyTree


@dataclass(frozen=True)
class ReducedCovariance(FactorFold):
    """Sums over documents of outer products, packed (`jhessians.linalg.symmetric`).

    Attributes:
        dtype: Number format of the sums.
    """

    dtype: DTypeLike = jnp.float32
    shares_inputs = True
    unit = "document"

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """Packed A, S and a count of terms, as `factor_shapes` says; see `Fold.shapes`."""
        return factor_shapes(site, self.dtype, activation=site.owns_input, terms=site.routed)

    def term(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """Σ ā āᵀ and Σ ĝ ĝᵀ over these documents; see `Fold.term`."""
        mask = jnp.ones(a.shape[:2], bool) if context.mask is None else context.mask
        counts = mask.sum(1, dtype=jnp.int32)
        summed = masked(g, context).astype(self.dtype).sum(1)
        term: dict[str, Any] = {"gradient": self._gram(summed, context)}
        if site.owns_input:
            total = masked(with_ones(a, site), context).astype(self.dtype).sum(1)
            mean = total / jnp.maximum(counts, 1)[:, None].astype(self.dtype)
            term["activation"] = self._gram(mean, context)
        if site.routed:
            term["terms"] = two_digits((counts > 0).sum(dtype=jnp.int32), self.dtype)
        return term

    def _gram(self, x: Float[Array, "n d"], context: Context) -> tuple[Array, ...]:
        return packed_gram(x.astype(self.dtype), multiple=context.shards, dtype=self.dtype)
