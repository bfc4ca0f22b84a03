"""Shampoo: A = Σ GᵀG / tr Σ GᵀG and S = Σ G Gᵀ over documents' gradients G.

Gupta et al. 2018, arXiv:1802.09568; scaled as Morwani et al. 2024, arXiv:2406.17748.
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
    """The sums of each document's G Gᵀ and Gᵀ G."""
    from jhessians.folds.shampoo import Shampoo

    return Shampoo(dtype)


SHAMPOO = FactoredMethod(
    name="shampoo",
    summary="factors of documents' gradients",
    formula="A = Σ GᵀG / tr Σ GᵀG, S = Σ G Gᵀ",
    cost="about T (I + O) + I² + O²",
    disk="as `kfac`",
    papers=("1802.09568", "2406.17748"),
    bergson="shampoo",
    rank=4,
    fold=fold,
    factor_flop=arithmetic.shampoo,
)
