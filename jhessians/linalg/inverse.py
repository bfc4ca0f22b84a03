"""Damped inverses of Kronecker-factored curvature in its eigenbasis.

Λ: [out, in], the eigenvalues; Q_S, Q_A: eigenvectors as columns.
"""

import jax
import jax.numpy as jnp

from jhessians.typing import Array, Float


def damped_inverse(
    eigenvalues: Float[Array, "o i"], mean: Float[Array, ""], *, damping_factor: float
) -> Float[Array, "o i"]:
    """Uniform Tikhonov inverse, 1 / (λ + damping_factor · mean).

    Args:
        eigenvalues: λ ≥ 0; may be one device's rows.
        mean: Mean over the *whole* spectrum.
        damping_factor: Relative to `mean`; dimensionless.

    Returns:
        Multipliers, same shape as `eigenvalues`.

    Raises:
        ValueError: If `damping_factor` is negative.

    References:
        Grosse et al. 2023, arXiv:2308.03296, section 3.2.
    """
    if damping_factor < 0:
        raise ValueError(f"damping_factor is {damping_factor}; expected 0 or more")
    return 1 / (eigenvalues + damping_factor * mean)


def inverse_vector_product(
    gradient: Float[Array, "*batch o i"],
    *,
    gradient_eigenvectors: Float[Array, "o o"],
    activation_eigenvectors: Float[Array, "i i"],
    eigenvalues: Float[Array, "o i"],
    damping_factor: float = 0.1,
) -> Float[Array, "*batch o i"]:
    """(H + damping)⁻¹ applied to gradients: Q_S (multiplier ∘ Q_Sᵀ V Q_A) Q_Aᵀ.

    Args:
        gradient: V, in the layout of the weight.
        gradient_eigenvectors: Q_S.
        activation_eigenvectors: Q_A.
        eigenvalues: Λ of a document: λ_S ⊗ λ_A, or their correction.
        damping_factor: Relative to the mean of Λ.

    Returns:
        The inverse times each gradient, of the same shape.

    Raises:
        ValueError: If `damping_factor` is negative.

    References:
        Grosse et al. 2023, arXiv:2308.03296, equation 21.
    """
    multiplier = damped_inverse(eigenvalues, eigenvalues.mean(), damping_factor=damping_factor)
    with jax.default_matmul_precision("highest"):
        rotated = gradient_eigenvectors.T @ gradient @ activation_eigenvectors
        scaled = rotated * jnp.broadcast_to(multiplier, rotated.shape)
        return gradient_eigenvectors @ scaled @ activation_eigenvectors.T
