"""KFAC: A = Σ a aᵀ and S = Σ g gᵀ over positions.

Martens & Grosse 2015, arXiv:1503.05671; for transformers the "expand" setting of Eschenhagen et
al. 2023, arXiv:2311.00636.
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
    """The covariances of inputs and gradients, over positions."""
    from jhessians.folds.covariance import Covariance

    return Covariance(dtype)


KFAC = FactoredMethod(
    name="kfac",
    summary="Kronecker factors of positions' inputs and gradients",
    formula="A = Σ a aᵀ, S = Σ g gᵀ",
    cost="(I² + O²) / 2",
    disk="2 (I² + O²) + I O",
    papers=("1503.05671", "2311.00636"),
    bergson="kfac",
    rank=2,
    fold=fold,
    factor_flop=arithmetic.covariances,
)
