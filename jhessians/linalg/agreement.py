"""What two halves of the data say of the whole's error.

Two independent halves give X + e₁ and X + e₂. If errors fall as 1/√n, the whole has half the error
that the halves differ by: E |e₁ - e₂|² = 2 E |e₁|², and a fit to twice the terms has half of
E |e₁|². |X|² itself is estimated without bias by the inner product of the halves. So

    error of n terms / |X| = √( |X₁ - X₂|² / 2 · (terms of a half / n) / ⟨X₁, X₂⟩ )

For A and S, which are means over terms, this is exact on average. An inverse also has a bias, which
both halves share and their difference doesn't show; it falls as 1/n. What the halves share is seen
beside the fit to all terms, |(X₁ + X₂) / 2 - X_all|. Where that is as large as the error, which
happens if terms aren't many times the dimensions, more terms do not help as 1/√n says.

All numbers are float64. X is given by three inner products, which add up over modules.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Products(NamedTuple):
    """Inner products of what two halves gave; sums of them are those of several modules together.

    Attributes:
        first: ⟨X₁, X₁⟩.
        second: ⟨X₂, X₂⟩.
        across: ⟨X₁, X₂⟩.
    """

    first: float
    second: float
    across: float

    def plus(self, other: "Products") -> "Products":
        """Those of both together."""
        return Products(*(a + b for a, b in zip(self, other, strict=True)))

    def difference(self) -> float:
        """|X₁ - X₂| / √⟨X₁, X₂⟩, the halves' relative Frobenius error to each other.

        Returns:
            0 or more; infinite if the halves have nothing in common, NaN if both are zero.
        """
        square = max(self.first + self.second - 2 * self.across, 0.0)
        if self.across <= 0:
            return float("inf") if square > 0 else float("nan")
        return float(np.sqrt(square / self.across))

    def error(self, share: float) -> float:
        """The relative error of a fit of which a half has this share of the terms.

        Args:
            share: Terms of a half over terms of the fit; ½ for the whole, more for fewer terms.

        Returns:
            As `difference`.
        """
        return self.difference() * float(np.sqrt(share / 2))


def of_arrays(first: Float[np.ndarray, "..."], second: Float[np.ndarray, "..."]) -> Products:
    """Products of two arrays of one shape."""
    left, right = np.asarray(first, np.float64).ravel(), np.asarray(second, np.float64).ravel()
    return Products(float(left @ left), float(right @ right), float(left @ right))


class Eigen(NamedTuple):
    """A matrix (Q_S ⊗ Q_A) diag(λ) (Q_S ⊗ Q_A)ᵀ.

    Attributes:
        values: λ [out, in].
        of_gradient: Q_S [out, out], eigenvectors as columns.
        of_activation: Q_A [in, in].
    """

    values: Float[np.ndarray, "o i"]
    of_gradient: Float[np.ndarray, "o o"]
    of_activation: Float[np.ndarray, "i i"]


def of_eigen(first: Eigen, second: Eigen) -> Products:
    """Products of two matrices of different eigenvectors, neither of which is ever formed.

    ⟨H₁, H₂⟩ = Σ λ¹ ∘ (P_S λ² P_Aᵀ), P the squares of the eigenvectors' inner products. Eigenvalues
    alone could not be compared: their order and, where some are about equal, their directions are
    each half's own.

    Args:
        first: H₁.
        second: H₂, of the same shapes.

    Returns:
        ⟨H₁, H₁⟩, ⟨H₂, H₂⟩ and ⟨H₁, H₂⟩.
    """
    p_s = np.square(first.of_gradient.T @ second.of_gradient)
    p_a = np.square(first.of_activation.T @ second.of_activation)
    seen = p_s @ second.values @ p_a.T
    return Products(
        float(np.square(first.values).sum()),
        float(np.square(second.values).sum()),
        float((first.values * seen).sum()),
    )


def times_more(error: float, wanted: float) -> float:
    """How many times the terms a fit needs for a smaller error, by 1/√n.

    Args:
        error: That it has.
        wanted: That it shall have.

    Returns:
        1 or more.
    """
    return max(1.0, (error / wanted) ** 2)


def cosine(error: float) -> float:
    """The cosine of X + e to X, for an error e that has no direction of its own: 1 / √(1 + ε²).

    Args:
        error: ε = |e| / |X|.

    Returns:
        0 to 1.
    """
    return 1 / float(np.sqrt(1 + error * error))
