"""A Hessian of Kronecker factors as the passes over queries and documents need it.

Its inverse is a multiplier in the eigenbasis of each linear (`jhessians.linalg.inverse`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jhessians.capture.problem import Problem
from jhessians.capture.site import Operands, Site
from jhessians.errors import CheckpointError, NumericsError
from jhessians.fitting.eigenbases import place_rows
from jhessians.linalg.inverse import Inversion, inverse_multiplier
from jhessians.typing import Array, DTypeLike

DAMPING_FACTOR = 0.01
"""Relative to the mean eigenvalue. On the demo it finds more of the known sources than bergson's
0.1, and as many as smaller factors, which are less safe where curvature is known less well."""


@runtime_checkable
class FactorSource(Protocol):
    """Where factors are read, one tensor at a time: `jhessians.interop.load.FactorStore` is one."""

    @property
    def kinds(self) -> Iterable[str]:
        """Kinds of factor that there are."""
        ...

    @property
    def modules(self) -> Iterable[str]:
        """The modules that have factors."""
        ...

    def shapes(self, kind: str) -> Mapping[str, tuple[int, ...]]:
        """Module → the shape of its tensor of a kind."""
        ...

    def read(self, kind: str, module: str) -> Shaped[np.ndarray, "..."]:
        """One whole tensor."""
        ...


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


def corrects(source: FactorSource, inverse: Inverse) -> bool:
    """Whether the corrected eigenvalues are taken.

    Args:
        source: The factors.
        inverse: What is asked for.

    Returns:
        What `ev_correction` says, or whether there are corrected eigenvalues.

    Raises:
        CheckpointError: If they are asked for and not there, or can't be inverted as asked.
    """
    there = "eigenvalue_correction" in source.kinds
    factored = inverse.inversion == "factored_tikhonov"
    wanted = (there and not factored) if inverse.ev_correction is None else inverse.ev_correction
    if wanted and not there:
        raise CheckpointError(
            "`ev_correction` is asked for, but the Hessian has no corrected eigenvalues; fit it "
            "with `ev_correction`, or leave that out"
        )
    if wanted and factored:
        raise CheckpointError(
            "`inversion` factored_tikhonov needs eigenvalues that are products of the factors', "
            "which corrected ones are not; take another inversion, or `ev_correction` false"
        )
    return wanted


def kronecker_operands(
    problem: Problem, source: FactorSource, inverse: Inverse, *, dtype: DTypeLike = jnp.float32
) -> Operands:
    """The operands of `SelfInfluence` and `Queries`: eigenvectors and multipliers, by site.

    Args:
        problem: The linears, and the devices.
        source: The factors, of all the linears.
        inverse: How to invert.
        dtype: Number format of the operands.

    Returns:
        `activation` Q_A, which linears with the same input share if they have the same one,
        `gradient` Q_S and `multiplier` [out, in]; stacked and sharded by rows.

    Raises:
        CheckpointError: If a linear has no factors, or of other shapes.
        NumericsError: If an eigenvalue of zero isn't damped.
    """
    require_factors(problem.sites, source)
    kind = "eigenvalue_correction" if corrects(source, inverse) else "eigenvalue"
    operands: dict[str, dict[str, Any]] = {}
    owned: dict[str, np.ndarray] = {}

    def stack(site: Site, kind: str) -> np.ndarray:
        arrays = [_widened(source.read(kind, name), dtype) for name in site.module_names()]
        return arrays[0] if site.members is None else np.stack(arrays)

    def place(site: Site, array: Any) -> Array:
        axis = 0 if site.members is None else 1
        return place_rows(np.asarray(array), problem.mesh, axis=axis)

    for site in problem.sites.values():
        here = operands.setdefault(site.name, {})
        vectors = stack(site, "activation_eigenvectors")
        shared = owned.get(site.input_site)
        if shared is None or not np.array_equal(shared, vectors):
            here["activation"] = place(site, vectors)
        if site.owns_input:
            owned[site.name] = vectors
        here["gradient"] = place(site, stack(site, "gradient_eigenvectors"))
        own: dict[str, Any] = {}
        if inverse.inversion == "factored_tikhonov":
            own = {f"{side}_eigenvalues": jnp.asarray(stack(site, f"{side}_eigenvalues"))
                   for side in ("activation", "gradient")}  # fmt: skip
        with jax.ensure_compile_time_eval():
            multiplier = np.asarray(
                inverse_multiplier(
                    jnp.asarray(stack(site, kind)), inversion=inverse.inversion,
                    damping_factor=inverse.damping_factor, **own,
                )
            )  # fmt: skip
        _require_finite(site, multiplier, inverse)
        here["multiplier"] = place(site, multiplier)
    return operands


def require_factors(sites: Mapping[str, Site], source: FactorSource) -> None:
    """Check that a Hessian is one of these linears.

    Args:
        sites: The linears.
        source: Its factors.

    Raises:
        CheckpointError: With the names, or the shapes, that don't match.
    """
    there = set(source.modules)
    names = [name for site in sites.values() for name in site.module_names()]
    if missing := [name for name in names if name not in there]:
        raise CheckpointError(
            f"the Hessian has no factors for {_some(missing)} of this model; it has them for "
            f"{_some(there)}: expected the Hessian of the same model and modules"
        )
    of_s, of_a = (source.shapes(f"{side}_eigenvectors") for side in ("gradient", "activation"))
    for site in sites.values():
        name = site.module_names()[0]
        o, i = of_s[name][0], of_a[name][0]
        if (o, i) != (site.out_features, site.inputs):
            hint = "; one of the two counts the bias" if i - site.inputs in (1, -1) else ""
            raise CheckpointError(
                f"the Hessian's factors of {name} are for a gradient [{o}, {i}]; this model's has "
                f"shape [{site.out_features}, {site.inputs}]{hint}: expected the same model"
            )


def _require_finite(site: Site, multiplier: np.ndarray, inverse: Inverse) -> None:
    if np.isfinite(multiplier).all():
        return
    stacked = multiplier if site.members is not None else multiplier[None]
    slot = next(n for n, each in enumerate(stacked) if not np.isfinite(each).all())
    raise NumericsError(
        f"the Hessian of {site.module_names()[slot]} is singular, and `damping_factor` "
        f"{inverse.damping_factor:g} doesn't change that; give a larger one, such as 0.001"
    )


def _widened(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    return np.asarray(array).astype(jnp.dtype(dtype))


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
