"""How each method fits and writes its Hessian: a function of the run."""

from collections.abc import Callable

from jhessians.methods import autocorrelation, factored
from jhessians.methods.run import Run

FITS: dict[str, Callable[[Run], None]] = {
    "kfac": factored.fit_run,
    "tkfac": factored.fit_run,
    "shampoo": factored.fit_run,
    "autocorrelation": autocorrelation.fit_run,
}
"""By the method's name in bergson."""
