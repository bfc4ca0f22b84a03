"""TKFAC: trace-restricted Kronecker factors, A = Σ tr(S_n) A_n and S = Σ tr(A_n) S_n.

Gao et al. 2020, arXiv:2011.10741, who divide by δ = Σ tr(A_n) tr(S_n); bergson doesn't.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jhessians.config.option import option
from jhessians.fitting import arithmetic
from jhessians.methods.factored import FactoredMethod

if TYPE_CHECKING:
    import numpy as np

    from jhessians.folds.covariance import FactorFold


@dataclass(frozen=True)
class TKFACOptions:
    """What TKFAC asks besides what every method does."""

    normalize_trace: bool = option(
        False,
        "Divide the activation factor by the trace, as tkfac's paper does and bergson does not.",
        group="statistics of --method tkfac",
    )


def fold(options: TKFACOptions, dtype: np.dtype) -> FactorFold:
    """Each document's factors, weighted by the trace of the other."""
    from jhessians.folds.tkfac import TKFAC

    return TKFAC(dtype, options.normalize_trace)


TKFAC = FactoredMethod(
    name="tkfac",
    summary="factors weighted by the other side's trace",
    formula="A = Σ tr(S_n) A_n, S = Σ tr(A_n) S_n",
    cost="(I² + O²) / 2",
    disk="as `kfac`",
    papers=("2011.10741",),
    bergson="tkfac",
    options=TKFACOptions,
    rank=3,
    fold=fold,
    factor_flop=partial(arithmetic.covariances, shares_inputs=False),
)
