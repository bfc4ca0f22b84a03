"""KFAC for shared weights, reduced: positions are averaged before products are taken.

A = Σ ā āᵀ and S = Σ ĝ ĝᵀ over documents, where ā is the mean of a document's inputs and ĝ the sum
of its gradients: the "reduce" setting of Eschenhagen et al. 2023, arXiv:2311.00636. It costs a
document's length less than KFAC, and bergson lacks it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jhessians.fitting import arithmetic
from jhessians.methods.factored import FactoredMethod

if TYPE_CHECKING:
    import numpy as np

    from jhessians.folds.covariance import FactorFold
    from jhessians.methods.method import NoOptions


def fold(options: NoOptions, dtype: np.dtype) -> FactorFold:
    """The covariances of means and sums over each document."""
    from jhessians.folds.reduced import ReducedCovariance

    return ReducedCovariance(dtype)


KFAC_REDUCE = FactoredMethod(
    name="kfac_reduce",
    summary="kfac of documents' mean inputs and summed gradients",
    formula="A = Σ ā āᵀ, S = Σ ĝ ĝᵀ, ā = mean a, ĝ = Σ g of a document",
    cost="(I² + O²) / 2T",
    disk="as `kfac`",
    papers=("2311.00636",),
    rank=5,
    fold=fold,
    factor_flop=arithmetic.reduced_covariances,
)
