"""EKFAC: KFAC's eigenvectors with corrected eigenvalues, Λ = Σ (Q_Sᵀ G Q_A)² over documents.

George et al. 2018, arXiv:1806.03884; Grosse et al. 2023, arXiv:2308.03296.
"""

from __future__ import annotations

from dataclasses import replace

from jhessians.methods.kfac import KFAC

EKFAC = replace(
    KFAC,
    name="ekfac",
    summary="kfac with the eigenvalue correction",
    formula="as `kfac`, and Λ = Σ (Q_Sᵀ G Q_A)²",
    cost="as `kfac` + I O + min(I², I² O / T) + min(O², I O² / T)",
    disk="as `kfac` + I O",
    papers=("1806.03884", "2308.03296"),
    rank=1,
    ev_correction=True,
)
