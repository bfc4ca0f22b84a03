"""Damped inverses of curvature in its eigenbasis.

λ: eigenvalues, [out, in] of a Kronecker-factored matrix, [d] of a dense one; Q_S, Q_A, Q:
eigenvectors as columns. An inverse is a multiplier for each eigenvalue, by which a gradient's
coefficient in the eigenbasis is scaled. Names and formulas are torch bergson's.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jhessians.typing import Array, Float

Inversion = Literal[
    "damped_inverse",
    "absolute_damped_inverse",
    "tikhonov_filtered",
    "pseudoinverse",
    "factored_tikhonov",
]
INVERSIONS: tuple[Inversion, ...] = get_args(Inversion)
"""What `inverse_multiplier` knows."""


def damped_inverse(
    eigenvalues: Float[Array, "*d"], mean: Float[Array, "*m"], *, damping_factor: float | Array
) -> Float[Array, "*d"]:
    """Uniform Tikhonov inverse, 1 / (λ + damping_factor · mean).

    Args:
        eigenvalues: λ ≥ 0; may be one device's rows.
        mean: Mean over the *whole* spectrum; 1 for an absolute damping.
        damping_factor: Relative to `mean`; dimensionless.

    Returns:
        Multipliers, same shape as `eigenvalues`.

    Raises:
        ValueError: If `damping_factor` is negative.

    References:
        Grosse et al. 2023, arXiv:2308.03296, section 3.2.
    """
    _require_sign(damping_factor)
    return 1 / (eigenvalues + damping_factor * mean)


def tikhonov_filtered(
    eigenvalues: Float[Array, "*d"], mean: Float[Array, "*m"], *, damping_factor: float | Array
) -> Float[Array, "*d"]:
    """The filter factor of ridge regression, λ / (λ² + (damping_factor · mean)²).

    It falls to 0 for small eigenvalues. Arguments and errors as in `damped_inverse`.

    Returns:
        Multipliers, same shape as `eigenvalues`.
    """
    _require_sign(damping_factor)
    return eigenvalues / (jnp.square(eigenvalues) + jnp.square(damping_factor * mean))


def pseudoinverse(
    eigenvalues: Float[Array, "*d"], mean: Float[Array, "*m"], *, damping_factor: float | Array
) -> Float[Array, "*d"]:
    """1 / λ where λ > damping_factor · mean, else 0.

    Arguments and errors as in `damped_inverse`.

    Returns:
        Multipliers, same shape as `eigenvalues`.
    """
    _require_sign(damping_factor)
    kept = eigenvalues > damping_factor * mean
    return jnp.where(kept, 1 / jnp.where(kept, eigenvalues, 1), 0)


def factored_tikhonov(
    gradient_eigenvalues: Float[Array, "*stack o"],
    activation_eigenvalues: Float[Array, "*stack i"],
    *,
    damping_factor: float | Array,
) -> Float[Array, "*stack o i"]:
    """Damping that is split between the two factors, so that the inverse is a Kronecker product.

    1 / ((λ_S + s / π) (λ_A + s π)) with s² = damping_factor · mean λ_S · mean λ_A and
    π² = mean λ_A / mean λ_S; in full λ_S λ_A + s π λ_S + (s / π) λ_A + s².

    Args:
        gradient_eigenvalues: λ_S ≥ 0.
        activation_eigenvalues: λ_A ≥ 0.
        damping_factor: Relative to the mean of λ_S ⊗ λ_A.

    Returns:
        Multipliers of λ_S ⊗ λ_A.

    Raises:
        ValueError: If `damping_factor` is negative.

    References:
        Martens & Grosse 2015, arXiv:1503.05671, section 6.3.
    """
    _require_sign(damping_factor)
    of_s, of_a = gradient_eigenvalues[..., :, None], activation_eigenvalues[..., None, :]
    least = jnp.finfo(of_s.dtype).tiny
    mean_s, mean_a = (
        jnp.maximum(x, 0).mean((-2, -1), keepdims=True) for x in (of_s, of_a)
    )  # fmt: skip
    mean = of_s.mean((-2, -1), keepdims=True) * of_a.mean((-2, -1), keepdims=True)
    root = jnp.sqrt(jnp.maximum(damping_factor * mean, 0))
    ratio = jnp.sqrt(jnp.maximum(mean_a / jnp.maximum(mean_s, least), least))
    damped = of_s * of_a + ratio * root * of_s + root / ratio * of_a + damping_factor * mean
    return 1 / damped


_BY_NAME: dict[str, Callable[..., Array]] = {
    "damped_inverse": damped_inverse,
    "absolute_damped_inverse": damped_inverse,
    "tikhonov_filtered": tikhonov_filtered,
    "pseudoinverse": pseudoinverse,
}


def inverse_multiplier(
    eigenvalues: Float[Array, "*d"],
    *,
    inversion: Inversion = "damped_inverse",
    damping_factor: float | Array = 0.1,
    axes: tuple[int, ...] = (-2, -1),
    gradient_eigenvalues: Float[Array, "*stack o"] | None = None,
    activation_eigenvalues: Float[Array, "*stack i"] | None = None,
) -> Float[Array, "*d"]:
    """What the coefficients of a gradient in the eigenbasis are multiplied with.

    Args:
        eigenvalues: λ, [*stack, out, in], or [*stack, d] of dense matrices.
        inversion: One of `INVERSIONS`.
        damping_factor: Relative to the mean of λ; with `absolute_damped_inverse` in the unit of λ.
        axes: Those of one matrix's spectrum, over which the mean is taken.
        gradient_eigenvalues: λ_S of `factored_tikhonov`; λ is λ_S ⊗ λ_A. A dense matrix has none:
            it gets `damped_inverse`.
        activation_eigenvalues: λ_A of `factored_tikhonov`.

    Returns:
        Multipliers, same shape as `eigenvalues`; infinite where a λ of zero isn't damped.

    Raises:
        ValueError: If `damping_factor` is negative or `inversion` unknown.
    """
    if inversion == "factored_tikhonov":
        if gradient_eigenvalues is not None and activation_eigenvalues is not None:
            return factored_tikhonov(
                gradient_eigenvalues, activation_eigenvalues, damping_factor=damping_factor
            )
        inversion = "damped_inverse"
    if inversion not in _BY_NAME:
        raise ValueError(f"inversion is {inversion!r}; expected one of {', '.join(INVERSIONS)}")
    absolute = inversion == "absolute_damped_inverse"
    mean = jnp.ones((), eigenvalues.dtype) if absolute else eigenvalues.mean(axes, keepdims=True)
    return _BY_NAME[inversion](eigenvalues, mean, damping_factor=damping_factor)


def in_eigenbasis(
    gradient: Float[Array, "*batch o i"],
    gradient_eigenvectors: Float[Array, "o o"],
    activation_eigenvectors: Float[Array, "i i"],
) -> Float[Array, "*batch o i"]:
    """Q_Sᵀ V Q_A, the coefficients of a gradient V."""
    return gradient_eigenvectors.mT @ gradient @ activation_eigenvectors


def out_of_eigenbasis(
    coefficients: Float[Array, "*batch o i"],
    gradient_eigenvectors: Float[Array, "o o"],
    activation_eigenvectors: Float[Array, "i i"],
) -> Float[Array, "*batch o i"]:
    """Q_S C Q_Aᵀ, the gradient with the coefficients C."""
    return gradient_eigenvectors @ coefficients @ activation_eigenvectors.mT


def inverse_vector_product(
    gradient: Float[Array, "*batch o i"],
    *,
    gradient_eigenvectors: Float[Array, "o o"],
    activation_eigenvectors: Float[Array, "i i"],
    eigenvalues: Float[Array, "o i"],
    damping_factor: float = 0.1,
    inversion: Inversion = "damped_inverse",
) -> Float[Array, "*batch o i"]:
    """(H + damping)⁻¹ applied to gradients: Q_S (multiplier ∘ Q_Sᵀ V Q_A) Q_Aᵀ.

    Args:
        gradient: V, in the layout of the weight.
        gradient_eigenvectors: Q_S.
        activation_eigenvectors: Q_A.
        eigenvalues: Λ of a document: λ_S ⊗ λ_A, or their correction.
        damping_factor: Relative to the mean of Λ.
        inversion: One of `INVERSIONS`; `factored_tikhonov` needs the factors' own eigenvalues
            (`Factors.apply` has them).

    Returns:
        The inverse times each gradient, of the same shape.

    Raises:
        ValueError: If `damping_factor` is negative, or `inversion` unknown or `factored_tikhonov`.

    References:
        Grosse et al. 2023, arXiv:2308.03296, equation 21.
    """
    if inversion == "factored_tikhonov":
        raise ValueError("factored_tikhonov needs the factors' own eigenvalues: use Factors.apply")
    multiplier = inverse_multiplier(eigenvalues, inversion=inversion, damping_factor=damping_factor)
    vectors = gradient_eigenvectors, activation_eigenvectors
    with jax.default_matmul_precision("highest"):
        rotated = in_eigenbasis(gradient, *vectors)
        scaled = rotated * jnp.broadcast_to(multiplier, rotated.shape)
        return out_of_eigenbasis(scaled, *vectors)


def _require_sign(damping_factor: float | Array) -> None:
    if isinstance(damping_factor, int | float) and damping_factor < 0:
        raise ValueError(f"damping_factor is {damping_factor}; expected 0 or more")
