"""How a Hessian is inverted: what is asked for, and whether there is such an inverse."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jhessians.errors import NumericsError
from jhessians.linalg.inverse import Inversion, inverse_multiplier
from jhessians.typing import DTypeLike

DAMPING_FACTOR = 0.01
"""Relative to the mean eigenvalue. On the demo it finds more of the known sources than bergson's
0.1, and as many as smaller factors, which are less safe where curvature is known less well."""


UNDAMPED = ("damped_inverse", "absolute_damped_inverse", "tikhonov_filtered", "factored_tikhonov")
"""Inversions that divide by an eigenvalue where there is no damping."""


@dataclass(frozen=True)
class Inverse:
    """How a Hessian is inverted.

    Attributes:
        inversion: One of `jhessians.linalg.inverse.INVERSIONS`.
        damping_factor: Relative to the mean eigenvalue of each linear, but with
            `absolute_damped_inverse`, where it is in the unit of eigenvalues.
        ev_correction: Whether eigenvalues are the corrected ones; None if there are such.
    """

    inversion: Inversion = "damped_inverse"
    damping_factor: float = DAMPING_FACTOR
    ev_correction: bool | None = None


def wide_multiplier(
    module: str,
    eigenvalues: Float[np.ndarray, "*d"],
    inverse: Inverse,
    *,
    axes: tuple[int, ...] = (-2, -1),
    dtype: DTypeLike = np.float64,
    own: Mapping[str, np.ndarray] | None = None,
) -> Float[np.ndarray, "*d"]:
    """What coefficients in a module's eigenbasis are multiplied with, computed in float64.

    Args:
        module: Its name.
        eigenvalues: Of the Hessian, in float64.
        inverse: How to invert.
        axes: Those of the spectrum.
        dtype: See `require_inverse`.
        own: The factors' own eigenvalues, see `inverse_multiplier`.

    Returns:
        As many numbers as there are eigenvalues.

    Raises:
        NumericsError: As `require_inverse`.
    """
    with jax.enable_x64(True):
        multiplier = np.asarray(
            inverse_multiplier(
                jnp.asarray(eigenvalues), inversion=inverse.inversion,
                damping_factor=inverse.damping_factor, axes=axes,
                **{name: jnp.asarray(values) for name, values in (own or {}).items()},
            )
        )  # fmt: skip
    require_inverse(module, eigenvalues, multiplier, inverse, dtype=dtype)
    return multiplier


def dense_inverse(
    module: str, matrix: Float[np.ndarray, "d d"], inverse: Inverse
) -> Float[np.ndarray, "d d"]:
    """The inverse of a module's dense Hessian, in float64.

    Args:
        module: Its name.
        matrix: The Hessian, as stored in float32.
        inverse: How to invert.

    Returns:
        A symmetric matrix.

    Raises:
        NumericsError: As `require_inverse`.
    """
    matrix = np.asarray(matrix, np.float64)
    require_finite(module, matrix)
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values = np.maximum(values, 0)
    return (vectors * wide_multiplier(module, values, inverse, axes=(-1,), dtype=np.float32)
            ) @ vectors.T  # fmt: skip


def require_inverse(
    module: str,
    eigenvalues: Float[np.ndarray, "*d"],
    multiplier: Float[np.ndarray, "*d"],
    inverse: Inverse,
    *,
    dtype: DTypeLike = np.float64,
) -> None:
    """Check that a module's Hessian has the inverse that was made of it.

    Args:
        module: Its name.
        eigenvalues: Of the Hessian.
        multiplier: What the inverse multiplies coefficients with.
        inverse: How it was made.
        dtype: The number format in whose rounding an eigenvalue is lost.

    Raises:
        NumericsError: If an eigenvalue of zero isn't damped, or a number isn't finite.
    """
    require_finite(module, eigenvalues)
    largest, smallest = float(eigenvalues.max()), float(eigenvalues.min())
    divides = inverse.inversion in UNDAMPED and not inverse.damping_factor
    if divides and smallest <= np.finfo(dtype).eps * max(eigenvalues.shape) * largest:
        raise NumericsError(
            f"the Hessian of {module} is singular (eigenvalues from {smallest:.3g} to "
            f"{largest:.3g}), and `damping_factor` is 0; give one such as {DAMPING_FACTOR}"
        )
    if not np.isfinite(multiplier).all():
        raise NumericsError(
            f"the Hessian of {module} is zero, or cancels `damping_factor` "
            f"{inverse.damping_factor:g}, which is relative to its mean eigenvalue; give "
            "`inversion` absolute_damped_inverse or pseudoinverse"
        )


def require_finite(module: str, array: np.ndarray) -> None:
    """Check that what was read of a module's Hessian is finite.

    Raises:
        NumericsError: If it isn't.
    """
    if not np.isfinite(array).all():
        raise NumericsError(
            f"the Hessian of {module} holds NaN or infinity; expected finite numbers: fit it again"
        )
