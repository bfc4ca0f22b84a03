"""Trace-restricted KFAC: A = Σ tr(S_n) A_n and S = Σ tr(A_n) S_n over documents n.

Gao et al. 2020, arXiv:2011.10741, whose factors are F ≈ A ⊗ S / δ with δ = Σ tr(A_n) tr(S_n), the
trace of either sum. bergson doesn't divide by δ, and neither do we unless `normalize` asks for it.
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
class TKFAC(FactorFold):
    """Each document's two covariances, weighted by the trace of the other one.

    Attributes:
        dtype: Number format of the running sums.
        normalize: Whether A is divided by δ at the end.
    """

    dtype: DTypeLike = jnp.float32
    normalize: bool = False
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
        """Σ tr(S_n) A_n and Σ tr(A_n) S_n over these documents; see `Fold.term`."""
        a = masked(with_ones(a, site), context).astype(self.dtype)
        g = masked(g, context).astype(self.dtype)
        return {
            "activation": _weighted_gram(a, _traces(g), context),
            "gradient": _weighted_gram(g, _traces(a), context),
        }

    def finish(self, sites: Mapping[str, Site], statistics: Statistics) -> Statistics:
        """Divide every A by its trace δ if `normalize` asks for it; see `FactorFold.finish`."""
        return divide_activation_by_trace(sites, statistics) if self.normalize else statistics


def _traces(x: Float[Array, "n s d"]) -> Float[Array, " n"]:
    """tr(Σ_s x xᵀ) of each document."""
    return jnp.square(x).sum((1, 2))


def _weighted_gram(
    x: Float[Array, "n s d"], weights: Float[Array, " n"], context: Context
) -> tuple[Array, ...]:
    """Σ_n weight_n x_nᵀ x_n, packed."""
    weighted = x * weights[:, None, None]
    rows = (t.reshape(-1, x.shape[-1]) for t in (x, weighted))
    return packed_product(*rows, multiple=context.shards)
