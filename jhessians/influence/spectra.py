"""The spectra of a Hessian's Kronecker factors, module by module, as far as a run's files tell."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jhessians.errors import CheckpointError
from jhessians.influence.curvature import FactorSource, corrects
from jhessians.influence.inversion import Inverse
from jhessians.linalg.spectra import Spectrum, condition_number, describe


class Sides(NamedTuple):
    """The spectra of a module's two factors.

    Attributes:
        activation: Of A.
        gradient: Of S.
    """

    activation: Spectrum
    gradient: Spectrum

    @property
    def dead(self) -> bool:
        """Whether no token reached the module, or none with a gradient."""
        return self.activation.dead or self.gradient.dead


class Curvature(NamedTuple):
    """The eigenvalues of a module's Hessian.

    Attributes:
        mean: Of all eigenvalues, to which damping is relative; of one document.
        largest: λ_max.
        condition_number: λ_max / λ_min; infinite where λ_min isn't positive.
        damped_condition_number: The same with damping.
    """

    mean: float
    largest: float
    condition_number: float
    damped_condition_number: float


def factor_spectra(source: FactorSource) -> dict[str, Sides]:
    """The spectra of A and S of every module, from their eigenvalues.

    Args:
        source: The factors; covariances are decomposed where their eigenvalues aren't stored.

    Returns:
        Module → spectra.

    Raises:
        CheckpointError: If there are neither eigenvalues nor covariances, or they are damaged.
    """
    found: dict[str, Sides] = {}
    for module in source.modules:
        found[module] = Sides(
            *(_spectrum(source, side, module) for side in ("activation", "gradient"))
        )
    return found


def curvatures(source: FactorSource, inverse: Inverse) -> dict[str, Curvature]:
    """The eigenvalues of every module's Hessian, corrected ones where `inverse` takes them.

    Args:
        source: The factors.
        inverse: Its damping factor is relative to each module's mean.

    Returns:
        Module → numbers.

    Raises:
        CheckpointError: If the eigenvalues aren't there, or damaged.
    """
    kind = "eigenvalue_correction" if corrects(source, inverse) else "eigenvalue"
    if kind not in source.kinds:
        raise CheckpointError(
            "the Hessian has no eigenvalues, which the older tree alone lacks; expected a folder "
            "eigenvalue_sharded: fit with `layout` both"
        )
    found = {}
    for module in source.modules:
        values = np.asarray(source.read(kind, module)).astype(np.float64)
        mean = float(values.mean())
        damped = condition_number(values, damping=inverse.damping_factor * mean)
        found[module] = Curvature(mean, float(values.max()), condition_number(values), damped)
    return found


def dead_modules(spectra: Mapping[str, Sides]) -> tuple[list[str], int]:
    """The modules that no token reached, and how many experts' modules there are.

    Args:
        spectra: From `factor_spectra`.

    Returns:
        Names, in order; and a number, 0 without a mixture of experts.
    """
    experts = [name for name in spectra if ".expert_" in name]
    return [name for name, sides in spectra.items() if sides.dead], len(experts)


def _spectrum(source: FactorSource, side: str, module: str) -> Spectrum:
    if f"{side}_eigenvalues" in source.kinds:
        values = source.read(f"{side}_eigenvalues", module)
        stored = values.dtype
    elif f"{side}_covariance" in source.kinds:
        covariance = source.read(f"{side}_covariance", module)
        stored, wide = covariance.dtype, covariance.astype(np.float64)
        values = np.linalg.eigvalsh((wide + wide.T) / 2)
    else:
        raise CheckpointError(
            f"the Hessian has no {side} eigenvalues, nor the covariances that they are of; "
            "expected a finished run: fit it again"
        )
    # Sums are in float32 where files hold fewer digits.
    summed = np.float64 if stored == np.float64 else np.float32
    return describe(values.astype(np.float64), precision=float(np.finfo(summed).eps))
