"""A Hessian of Kronecker factors as the passes over queries and documents need it.

Its inverse is a multiplier in the eigenbasis of each linear (`jhessians.linalg.inverse`).
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jhessians.capture.problem import Problem
from jhessians.capture.site import Operands, Site
from jhessians.errors import CheckpointError
from jhessians.fitting.eigenbases import place_rows
from jhessians.influence.inversion import Inverse, require_finite, require_inverse
from jhessians.linalg.inverse import inverse_multiplier
from jhessians.typing import Array, DTypeLike


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
    kind = "eigenvalue_correction" if corrects(source, inverse) else "eigenvalue"
    factored = inverse.inversion == "factored_tikhonov"
    of_sides = ("activation_eigenvalues", "gradient_eigenvalues") if factored else ()
    require_factors(problem.sites, source, (kind, *of_sides))
    operands: dict[str, dict[str, Any]] = {}
    owned: dict[str, np.ndarray] = {}

    def stack(site: Site, kind: str) -> np.ndarray:
        arrays = []
        for name in site.module_names():
            arrays.append(_widened(source.read(kind, name), dtype))
            require_finite(name, arrays[-1])
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
        own: dict[str, Any] = {each: jnp.asarray(stack(site, each)) for each in of_sides}
        eigenvalues = stack(site, kind)
        with jax.ensure_compile_time_eval():
            multiplier = np.asarray(
                inverse_multiplier(
                    jnp.asarray(eigenvalues), inversion=inverse.inversion,
                    damping_factor=inverse.damping_factor, **own,
                )
            )  # fmt: skip
        for slot, name in zip(site.slots, site.module_names(), strict=True):
            place_in = () if slot is None else slot
            require_inverse(name, eigenvalues[place_in], multiplier[place_in], inverse)
        here["multiplier"] = place(site, multiplier)
    return operands


def require_factors(
    sites: Mapping[str, Site], source: FactorSource, kinds: Iterable[str] = ()
) -> None:
    """Check that a Hessian is one of these linears.

    Args:
        sites: The linears.
        source: Its factors.
        kinds: Of factor that are needed, besides eigenvectors.

    Raises:
        CheckpointError: With the names, or the shapes, that don't match.
    """
    vectors = [f"{side}_eigenvectors" for side in ("gradient", "activation")]
    wanted = ", ".join(each for each in (*vectors, *kinds) if each not in source.kinds)
    if wanted:
        raise CheckpointError(
            f"the Hessian has no {wanted}; expected that of a finished run: fit it again"
        )
    there = set(source.modules)
    names = [name for site in sites.values() for name in site.module_names()]
    if missing := [name for name in names if name not in there]:
        raise CheckpointError(
            f"the Hessian has no factors for {_some(missing)} of this model; it has them for "
            f"{_some(there)}: expected the Hessian of the same model and modules"
        )
    of_s, of_a = map(source.shapes, vectors)
    for site in sites.values():
        name = site.module_names()[0]
        o, i = of_s[name][0], of_a[name][0]
        if (o, i) != (site.out_features, site.inputs):
            hint = "; one of the two counts the bias" if i - site.inputs in (1, -1) else ""
            raise CheckpointError(
                f"the Hessian's factors of {name} are for a gradient [{o}, {i}]; this model's has "
                f"shape [{site.out_features}, {site.inputs}]{hint}: expected the same model"
            )


def _widened(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    return np.asarray(array).astype(jnp.dtype(dtype))


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
