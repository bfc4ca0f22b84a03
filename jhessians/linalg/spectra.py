"""What a spectrum says of a covariance: how many directions it has, and which of them are noise.

λ: eigenvalues of a positive semi-definite matrix C = Σ x xᵀ, in any order and unit, in float64.

The **noise floor** is where rounding ends: eigenvalues of at most ε λ_max, ε the distance from 1 to
the next number of the format in which C was summed, or of at most |λ_min| where λ_min is negative,
which no exact sum is. Terms fewer than dimensions leave d - n eigenvalues at zero, which come out
below this floor. Errors of single entries of C are at most about ε λ_max, so that an eigenvalue
above the floor is not made by rounding. It may still be made by few terms: what these make is a
matter of the split-half comparison (`jhessians.linalg.agreement`).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

Values = Float[np.ndarray, "..."]


class Spectrum(NamedTuple):
    """A spectrum in a few numbers.

    Attributes:
        dimension: d, how many eigenvalues there are.
        largest: λ_max, in the unit of the eigenvalues.
        stable_rank: See `stable_rank`.
        effective_rank: See `effective_rank`.
        condition_number: See `condition_number`.
        at_floor: The share of eigenvalues at the noise floor, 0 to 1.
    """

    dimension: int
    largest: float
    stable_rank: float
    effective_rank: float
    condition_number: float
    at_floor: float

    @property
    def dead(self) -> bool:
        """Whether nothing was summed, as for an expert that no token reached."""
        return self.largest <= 0


def describe(eigenvalues: Shaped[np.ndarray, "..."], *, precision: float) -> Spectrum:
    """All numbers of a spectrum.

    Args:
        eigenvalues: λ.
        precision: ε of the format in which the matrix was summed, such as 1.2e-7 of float32.

    Returns:
        Numbers; ranks are 0, the condition number infinite and all at the floor where λ is zero.
    """
    values = np.asarray(eigenvalues, np.float64).ravel()
    return Spectrum(
        len(values),
        float(values.max()),
        stable_rank(values),
        effective_rank(values),
        condition_number(values),
        float((values <= noise_floor(values, precision=precision)).mean()),
    )


def stable_rank(eigenvalues: Values) -> float:
    """Σ λ / λ_max, the stable rank |X|²_F / |X|²₂ of the matrix X whose rows are summed, C = XᵀX.

    At most the rank. Directions of equal size count 1 each; a single large one hides the others.
    With n terms the error of C, as a share of λ_max, is about √(stable rank / n).

    Args:
        eigenvalues: λ.

    Returns:
        1 to d; 0 of a matrix of zeros.

    References:
        Rudelson & Vershynin 2007, math/0503442; Koltchinskii & Lounici 2017, arXiv:1405.2468.
    """
    values = np.maximum(eigenvalues, 0)
    largest = values.max()
    return float(values.sum() / largest) if largest > 0 else 0.0


def effective_rank(eigenvalues: Values) -> float:
    """exp(-Σ p log p) with p = λ / Σ λ: in how many directions the sum lies, by entropy.

    Args:
        eigenvalues: λ.

    Returns:
        1 to d; 0 of a matrix of zeros.

    References:
        Roy & Vetterli 2007, "The effective rank".
    """
    values = np.maximum(eigenvalues, 0)
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def condition_number(eigenvalues: Values, *, damping: float = 0.0) -> float:
    """(λ_max + damping) / (λ_min + damping).

    Args:
        eigenvalues: λ.
        damping: What is added to each, in their unit.

    Returns:
        At least 1; infinite if the smallest one, damped, is zero or negative.
    """
    smallest = float(eigenvalues.min()) + damping
    return (float(eigenvalues.max()) + damping) / smallest if smallest > 0 else np.inf


def noise_floor(eigenvalues: Values, *, precision: float) -> float:
    """max(ε λ_max, -λ_min), see the module.

    Args:
        eigenvalues: λ.
        precision: ε.

    Returns:
        In the unit of the eigenvalues; eigenvalues up to it are at the floor.
    """
    return max(precision * float(eigenvalues.max()), -float(eigenvalues.min()), 0.0)


def contradicted(
    eigenvalues: Float[np.ndarray, " d"], held_out: Float[np.ndarray, " d"], *, factor: float = 2.0
) -> float:
    """The share of eigenvalues that other data contradict by more than a factor.

    The i-th held-out value is uᵢᵀ C' uᵢ for the i-th eigenvector and a covariance C' of other
    terms: what λᵢ would be were it not fitted to its own. Small eigenvalues of few terms come out
    too small, those of n < d terms as zero, while held-out values have no bias.

    Args:
        eigenvalues: λ, means over terms.
        held_out: uᵀ C' u, likewise.
        factor: By how much the two may differ.

    Returns:
        0 to 1.

    References:
        Abadir, Distaso & Žikeš 2014, "Design-free estimation of variance matrices".
    """
    wrong = (eigenvalues * factor < held_out) | (eigenvalues > factor * held_out)
    return float(wrong.mean())


def median(numbers: Iterable[float]) -> float:
    """The median of those that are finite; NaN of none."""
    finite = [x for x in numbers if np.isfinite(x)]
    return float(np.median(finite)) if finite else float("nan")
