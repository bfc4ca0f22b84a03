"""Options of how a Hessian is inverted; no JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass

from jhessians.config.option import option

INVERSE = "inverse"

INVERSIONS = (
    "damped_inverse",
    "absolute_damped_inverse",
    "tikhonov_filtered",
    "pseudoinverse",
    "factored_tikhonov",
)
"""Those of `jhessians.linalg.inverse`, which imports JAX."""

REFINABLE = ("damped_inverse", "absolute_damped_inverse")
"""Those that add a multiple of the identity, which a refinement solves with."""


@dataclass(frozen=True)
class InversionOptions:
    """The inverse's formula, its damping, and which eigenvalues it takes."""

    inversion: str = option(
        "damped_inverse",
        "Formula, for an eigenvalue λ, the mean m of its module's, and the damping factor c: "
        "damped_inverse 1 / (λ + c m), absolute_damped_inverse 1 / (λ + c), tikhonov_filtered "
        "λ / (λ² + (c m)²), pseudoinverse 1 / λ where λ > c m and else 0, factored_tikhonov with "
        "the damping split between the two factors.",
        group=INVERSE,
        metavar="HOW",
        choices=INVERSIONS,
    )
    damping_factor: float = option(
        0.01,
        "How much curvature is added everywhere, relative to the mean eigenvalue (but see "
        "absolute_damped_inverse); bergson's default is 0.1.",
        group=INVERSE,
        metavar="C",
        minimum=0.0,
    )
    ev_correction: bool | None = option(
        None,
        "Take the corrected eigenvalues of Kronecker factors.",
        group=INVERSE,
        value_type="flag",
        default_text="true if the Hessian has them",
    )
