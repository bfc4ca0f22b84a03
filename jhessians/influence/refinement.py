"""Solve (G + D) x = q exactly, from what Kronecker factors make of q (Wang et al. 2025, ASTRA).

G is the Gauss-Newton Hessian, a mean over documents, D the damping of each module. Conjugate
gradients start from (H + D)⁻¹ q and are preconditioned by the same inverse, all q side by side.

References:
    arXiv:2507.14740; the preconditioner and the documents are chosen as torch bergson's `astra`
    chooses them.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jhessians.capture.problem import Problem, document_ids
from jhessians.devices.compiling import compiled
from jhessians.devices.hosts import fetch, sum_of_hosts
from jhessians.errors import ConfigError
from jhessians.influence.curvature import corrects
from jhessians.influence.factors import Factors
from jhessians.influence.gauss_newton import GaussNewtonPass, Vectors
from jhessians.influence.inversion import Inverse
from jhessians.typing import Array, Float, PyTree

REFINABLE = ("damped_inverse", "absolute_damped_inverse")
"""Inversions that add a multiple of the identity, as D is."""

Solutions = dict[str, Float[Array, "query _ _"]]


class Refined(NamedTuple):
    """Solutions, and how good they are.

    Attributes:
        solutions: x, module → [query, out, in].
        residuals: |q - (G + D) x| / |q| before the first step and after each, [step, query].
        objectives: xᵀ (G + D) x / 2 - xᵀ q at the same points, [step, query].
    """

    solutions: Solutions
    residuals: Float[np.ndarray, "step query"]
    objectives: Float[np.ndarray, "step query"]


class _State(NamedTuple):
    """Where conjugate gradients stand.

    Attributes:
        x: Solutions.
        r: What is left, q - (G + D) x.
        p: The next directions.
        rz: r · (H + D)⁻¹ r, [query].
        going: Which queries go on, [query].
    """

    x: Solutions
    r: Solutions
    p: Solutions
    rz: Array
    going: Array


def refine(
    problem: Problem,
    batches: Iterable[PyTree[np.ndarray]],
    queries: Vectors,
    factors: Factors,
    *,
    documents: int | None = None,
    steps: int = 20,
    tolerance: float = 1e-3,
    advance: Callable[[int], None] = lambda steps: None,
) -> Refined:
    """Solutions of (G + D) x = q for the Gauss-Newton Hessian of some documents.

    On the devices are, beside the model and the factors, about eight arrays as large as all
    queries.

    Args:
        problem: A loss as for `gauss_newton_product`, model, linears and devices.
        batches: This host's rows of the documents that G is the mean of; all are held.
        queries: q, gradients by module, [query, out, in].
        factors: H of the same modules, whose `inverse` says how it is damped: D is what it adds.
        documents: How many they are; by default the rows of `batches` that are documents.
        steps: At most so many, each a product with G.
        tolerance: A query is done when its residual, relative to |q|, isn't larger.
        advance: Called after each step with 1, or with the number of steps that weren't needed.

    Returns:
        Solutions, none of whose objectives is larger than at the start; residuals and objectives.

    Raises:
        ConfigError: If the factors' inversion isn't one of `REFINABLE`.
        ValueError: If `steps` is negative, or queries and problem have different modules.
    """
    inverse = factors.inverse
    if inverse.inversion not in REFINABLE:
        raise ConfigError(
            f"`inversion` is {inverse.inversion}, which adds no multiple of the identity; a "
            f"refinement expects {' or '.join(REFINABLE)}"
        )
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected 0 or more")
    batches, products = list(batches), GaussNewtonPass(problem)
    documents = documents or _count(batches, problem)
    damping = {name: products.put(x) for name, x in _damping(factors, inverse).items()}
    q = {name: products.put(x) for name, x in queries.items()}

    def damped(vectors: Solutions) -> Solutions:
        return _combined(products.run(batches, vectors), vectors, damping, 1 / documents)

    x = _apply(factors, q)
    state = _start(factors, q, x, damped(x), tolerance)
    measured = [_measured(q, state)]
    for step in range(steps):
        if not fetch(state.going).any():
            advance(steps - step)
            break
        state = _step(factors, q, state, damped(state.p), tolerance)
        measured.append(_measured(q, state))
        advance(1)
    residuals, objectives = (np.stack([fetch(m[i]) for m in measured]) for i in (0, 1))
    # Rounding may have made the Hessian indefinite; such a query keeps what it began with.
    better = products.put(objectives[-1] <= objectives[0])
    solutions = jax.tree.map(
        lambda new, old: jnp.where(better[:, None, None], new, old), state.x, x
    )
    return Refined(solutions, residuals, objectives)


@compiled
def _apply(factors: Factors, vectors: Solutions) -> Solutions:
    applied: Solutions = factors.apply(vectors)
    return applied


@compiled
def _combined(
    product: Solutions, vectors: Solutions, damping: dict[str, Array], share: float | Array
) -> Solutions:
    """(G + D) v of a sum over documents."""
    return {name: share * product[name] + damping[name] * v for name, v in vectors.items()}


@compiled
def _start(
    factors: Factors, q: Solutions, x: Solutions, ax: Solutions, tolerance: float | Array
) -> _State:
    r = jax.tree.map(jnp.subtract, q, ax)
    z = factors.apply(r)
    return _State(x, r, z, _dot(r, z), _goes_on(q, r, tolerance))


@compiled
def _step(
    factors: Factors, q: Solutions, state: _State, ap: Solutions, tolerance: float | Array
) -> _State:
    """One step of preconditioned conjugate gradients; queries that are done stay where they are."""
    curvature = _dot(state.p, ap)
    going = state.going & (curvature > 0)
    length = jnp.where(going, state.rz / jnp.where(going, curvature, 1), 0)
    x, r = _moved(state.x, length, state.p), _moved(state.r, -length, ap)
    z = factors.apply(r)
    rz = _dot(r, z)
    p = _moved(z, jnp.where(going, rz / jnp.where(going, state.rz, 1), 0), state.p)
    return _State(x, r, p, rz, going & _goes_on(q, r, tolerance))


@compiled
def _measured(q: Solutions, state: _State) -> tuple[Array, Array]:
    """Residuals and objectives; with r = q - (G + D) x the objective is -(q + r)ᵀ x / 2."""
    square = _dot(q, q)
    share = _dot(state.r, state.r) / jnp.maximum(square, jnp.finfo(square.dtype).tiny)
    return jnp.sqrt(share), -(_dot(q, state.x) + _dot(state.r, state.x)) / 2


def _goes_on(q: Solutions, r: Solutions, tolerance: float | Array) -> Array:
    return _dot(r, r) > jnp.square(tolerance) * _dot(q, q)


def _moved(start: Solutions, length: Array, direction: Solutions) -> Solutions:
    return jax.tree.map(lambda x, d: x + length[:, None, None] * d, start, direction)


def _dot(left: Solutions, right: Solutions) -> Array:
    """Inner products over all modules, [query]."""
    parts = [jnp.einsum("koi,koi->k", left[name], right[name]) for name in left]
    return jnp.stack(parts).sum(0)


def _damping(factors: Factors, inverse: Inverse) -> dict[str, np.ndarray]:
    """What the inverse adds to each module's eigenvalues."""
    kind = "eigenvalue_correction" if corrects(factors, inverse) else "eigenvalue"
    absolute = inverse.inversion == "absolute_damped_inverse"
    return {
        name: np.asarray(inverse.damping_factor * (1.0 if absolute else fetch(x).mean()))
        for name, x in factors[kind].items()
    }


def _count(batches: list[PyTree[np.ndarray]], problem: Problem) -> int:
    """How many documents the batches of all hosts hold."""
    count = 0
    for batch in batches:
        numbers = document_ids(batch)
        rows = len(jax.tree.leaves(batch)[0])
        count += rows if numbers is None else int((np.asarray(numbers) >= 0).sum())
    return sum_of_hosts(count) if problem.mesh else count
