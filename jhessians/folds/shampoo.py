"""Shampoo's factors: A = Σ G_nᵀ G_n / tr(Σ G_nᵀ G_n) and S = Σ G_n G_nᵀ over documents n.

Gupta et al. 2018, arXiv:1802.09568; as a curvature estimate, with the trace's scale that makes
A ⊗ S an approximation of the Fisher, Morwani et al. 2024, arXiv:2406.17748. G_n = Σ g aᵀ is the
gradient of a document.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jhessians.capture.fold import Context
from jhessians.capture.site import Site, Statistics
from jhessians.folds.covariance import (
    FactorFold,
    divide_activation_by_trace,
    factor_shapes,
    masked,
    with_ones,
)
from jhessians.linalg.symmetric import packed_product
from jhessians.typing import Array, DTypeLike, Float, PyTree


@dataclass(frozen=True)
class Shampoo(FactorFold):
    """Sums over documents of G_nᵀ G_n and of G_n G_nᵀ.

    Attributes:
        dtype: Number format of the running sums.
    """

    dtype: DTypeLike = jnp.float32
    shares_inputs = False  # A depends on the gradients too

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """Packed A and S, as `factor_shapes` says; see `Fold.shapes`."""
        return factor_shapes(site, self.dtype, activation=True)

    def term(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """Σ G_nᵀ G_n and Σ G_n G_nᵀ over these documents; see `Fold.term`."""
        a = masked(with_ones(a, site), context).astype(self.dtype)
        g = masked(g, context).astype(self.dtype)
        return {"activation": _second_moment(a, g, context),
                "gradient": _second_moment(g, a, context)}  # fmt: skip

    def finish(self, sites: Mapping[str, Site], statistics: Statistics) -> Statistics:
        """Divide every A by its trace; see `FactorFold.finish`."""
        return divide_activation_by_trace(sites, statistics)


def _second_moment(
    x: Float[Array, "n s d"], y: Float[Array, "n s e"], context: Context
) -> tuple[Array, ...]:
    """Σ_n (y_nᵀ x_n)ᵀ (y_nᵀ x_n) over documents.

    With fewer positions than features it is computed as xᵀ (y yᵀ) x, through the positions' Gram
    matrix y yᵀ [s, s], so that the gradient y_nᵀ x_n [e, d] is never formed.

    Returns:
        The sum [d, d], packed.
    """
    d = x.shape[-1]
    if x.shape[1] < y.shape[-1]:
        mixed = jnp.einsum("nse,nte->nst", y, y) @ x
        rows = x.reshape(-1, d), mixed.reshape(-1, d)
    else:
        gradients = jnp.einsum("nse,nsd->ned", y, x).reshape(-1, d)
        rows = gradients, gradients
    return packed_product(*rows, multiple=context.shards)
