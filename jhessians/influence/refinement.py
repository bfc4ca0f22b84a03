"""Solve (G + D) x = q by conjugate gradients, from what Kronecker factors make of q.

They are preconditioned by the same factors' inverse, and go through the same documents at each
step, all q side by side.

References:
    arXiv:2507.14740; the preconditioner and the documents are chosen as torch bergson's `astra`
    chooses them for its solver `cg`.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jhessians.capture.problem import Problem
from jhessians.devices.compiling import compiled
from jhessians.devices.hosts import fetch
from jhessians.influence.equations import (
    Equations,
    Refined,
    Solutions,
    dot,
    keep,
    measure,
    moved,
    precondition,
)
from jhessians.influence.factors import Factors
from jhessians.influence.gauss_newton import GaussNewtonPass, Vectors
from jhessians.typing import Array, PyTree


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
    problem: Problem | GaussNewtonPass,
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
        problem: A loss as for `gauss_newton_product`, model, linears and devices; or a
            `GaussNewtonPass` of such a problem, whose compilations then serve again.
        batches: This host's rows of the documents that G is the mean of; all are held.
        queries: q, gradients by module, [query, out, in].
        factors: H of the same modules, whose `inverse` says how it is damped: D is what it adds.
        documents: How many they are; by default the rows of `batches` that are documents.
        steps: At most so many, each a product with G.
        tolerance: A query is done when its residual, relative to |q|, isn't larger.
        advance: Called after each step with 1, or with the number of steps that weren't needed.

    Returns:
        Solutions, none of whose objectives is larger than at the start; residuals and objectives
        after every step.

    Raises:
        ConfigError: If the factors' inversion isn't one of `REFINABLE`.
        ValueError: If `steps` is negative, or queries and problem have different modules.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected 0 or more")
    equations, batches = Equations(problem, queries, factors), list(batches)
    documents, q = documents or equations.count(batches), equations.q
    x = precondition(factors, q)
    state = _start(factors, q, x, equations.times(batches, documents, x), tolerance)
    measured = [measure(q, state.x, state.r)]
    for step in range(steps):
        if not fetch(state.going).any():
            advance(steps - step)
            break
        along = equations.times(batches, documents, state.p)
        state = _step(factors, q, state, along, tolerance)
        measured.append(measure(q, state.x, state.r))
        advance(1)
    residuals, objectives = (np.stack([fetch(m[i]) for m in measured]) for i in (0, 1))
    # Rounding may have made the Hessian indefinite; such a query keeps what it began with.
    better = objectives[-1] <= objectives[0]
    kept, solutions = (len(measured) - 1) * better, keep(equations.put(better), state.x, x)
    return Refined(solutions, residuals, objectives, np.arange(len(measured)), kept)


@compiled
def _start(
    factors: Factors, q: Solutions, x: Solutions, ax: Solutions, tolerance: float | Array
) -> _State:
    r = {name: q[name] - ax[name] for name in q}
    z = factors.apply(r)
    return _State(x, r, z, dot(r, z), _goes_on(q, r, tolerance))


@compiled
def _step(
    factors: Factors, q: Solutions, state: _State, ap: Solutions, tolerance: float | Array
) -> _State:
    """One step of preconditioned conjugate gradients; queries that are done stay where they are."""
    curvature = dot(state.p, ap)
    going = state.going & (curvature > 0)
    length = jnp.where(going, state.rz / jnp.where(going, curvature, 1), 0)
    x, r = moved(state.x, length, state.p), moved(state.r, -length, ap)
    z = factors.apply(r)
    rz = dot(r, z)
    p = moved(z, jnp.where(going, rz / jnp.where(going, state.rz, 1), 0), state.p)
    return _State(x, r, p, rz, going & _goes_on(q, r, tolerance))


def _goes_on(q: Solutions, r: Solutions, tolerance: float | Array) -> Array:
    return dot(r, r) > jnp.square(tolerance) * dot(q, q)
