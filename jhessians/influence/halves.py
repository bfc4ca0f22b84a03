"""A Hessian fitted to two halves of the data: how far the halves agree, module by module.

Numpy in float64. Factors are kind → module → array, as `fit` returns them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from jhessians.linalg.agreement import Eigen, Products, of_arrays, of_eigen
from jhessians.linalg.spectra import contradicted

Arrays = Mapping[str, Mapping[str, Shaped[np.ndarray, "..."]]]


class ModuleAgreement(NamedTuple):
    """What the halves say of one module.

    Attributes:
        activation: Products of the two A, means over terms.
        gradient: Of the two S.
        hessian: Of the two (Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ, each with its own eigenvectors.
        activation_contradicted: The share of A's eigenvalues that the other half contradicts by
            more than a factor of 2 (`jhessians.linalg.spectra.contradicted`).
        gradient_contradicted: Of S's.
        inverses: Damping factor → products of (H + damping)⁻¹ q, all q together.
        shared: Damping factor → products of the mean of both halves' solutions and the solution of
            the fit to all terms; empty without such a fit.
    """

    activation: Products
    gradient: Products
    hessian: Products
    activation_contradicted: float
    gradient_contradicted: float
    inverses: dict[float, Products]
    shared: dict[float, Products]


def compare(
    module: str,
    halves: tuple[Arrays, Arrays],
    terms: tuple[int, int],
    queries: Float[np.ndarray, "query o i"],
    dampings: Sequence[float],
    *,
    whole: Arrays | None = None,
) -> ModuleAgreement:
    """Compare two halves' factors of a module.

    Args:
        module: Its name.
        halves: The factors of each.
        terms: How many terms each one's covariances are sums of.
        queries: q, to which the inverses are applied.
        dampings: Damping factors, relative to the mean eigenvalue.
        whole: The factors of the fit to all terms.

    Returns:
        How far they agree.
    """
    sides, shares = [], []
    for side in ("activation", "gradient"):
        pair = [half[f"{side}_covariance"][module].astype(np.float64) / n
                for half, n in zip(halves, terms, strict=True)]  # fmt: skip
        vectors = [half[f"{side}_eigenvectors"][module].astype(np.float64) for half in halves]
        sides.append(of_arrays(*pair))
        shares.append(
            np.mean([
                contradicted(_along(u, pair[k]), _along(u, pair[1 - k]))
                for k, u in enumerate(vectors)
            ])
        )  # fmt: skip
    eigens = [eigen_of(half, module) for half in halves]
    wide = queries.astype(np.float64)
    rotated = [each.of_gradient.T @ wide @ each.of_activation for each in eigens]
    all_terms = None if whole is None else eigen_of(whole, module)
    inverses, shared = {}, {}
    for damping in dampings:
        first, second = (_solution(e, c, damping) for e, c in zip(eigens, rotated, strict=True))
        inverses[damping] = of_arrays(first, second)
        if all_terms is not None:
            coefficients = all_terms.of_gradient.T @ wide @ all_terms.of_activation
            solution = _solution(all_terms, coefficients, damping)
            shared[damping] = of_arrays((first + second) / 2, solution)
    return ModuleAgreement(
        sides[0], sides[1], of_eigen(*eigens), float(shares[0]), float(shares[1]), inverses, shared
    )


def eigen_of(factors: Arrays, module: str) -> Eigen:
    """A module's Hessian, with corrected eigenvalues where there are such.

    Args:
        factors: Of all modules.
        module: Which one.

    Returns:
        In float64.
    """
    kind = "eigenvalue_correction" if "eigenvalue_correction" in factors else "eigenvalue"
    names = (kind, "gradient_eigenvectors", "activation_eigenvectors")
    return Eigen(*(factors[name][module].astype(np.float64) for name in names))


def multiplier(values: Float[np.ndarray, "o i"], damping: float) -> Float[np.ndarray, "o i"]:
    """1 / (λ + damping · mean λ); 0 of a module that no token reached, which has no inverse.

    Args:
        values: λ.
        damping: The damping factor.

    Returns:
        Of the same shape.
    """
    added = damping * values.mean()
    if not values.any():
        return np.zeros_like(values)
    inverted: np.ndarray = 1 / (values + added)
    return inverted


def _solution(
    eigen: Eigen, coefficients: Float[np.ndarray, "query o i"], damping: float
) -> Float[np.ndarray, "query o i"]:
    scaled = multiplier(eigen.values, damping) * coefficients
    solution: np.ndarray = eigen.of_gradient @ scaled @ eigen.of_activation.T
    return solution


def _along(
    vectors: Float[np.ndarray, "d d"], covariance: Float[np.ndarray, "d d"]
) -> Float[np.ndarray, " d"]:
    """uᵀ C u of every column."""
    along: np.ndarray = (vectors * (covariance @ vectors)).sum(0)
    return along
