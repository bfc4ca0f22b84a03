"""Solve (G + D) x = q by gradient descent with momentum, on other documents at each step (ASTRA).

From x = (H + D)⁻¹ q, with the mean G_t over the documents of step t,

    b ← momentum · b + (H + D)⁻¹ ((G_t + D) x - q)        x ← x - lr · b

all q side by side. A step's documents are the same for all queries, where torch bergson draws them
for each query anew.

References:
    Wang et al. 2025, arXiv:2507.14740; steps and defaults are those of torch bergson's `astra`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jhessians.capture.problem import Problem
from jhessians.devices.compiling import compiled
from jhessians.devices.hosts import fetch
from jhessians.influence.equations import (
    Equations,
    Refined,
    Solutions,
    keep,
    measure,
    moved,
    precondition,
)
from jhessians.influence.factors import Factors
from jhessians.influence.gauss_newton import GaussNewtonPass, Vectors
from jhessians.typing import Array, PyTree


@dataclass(frozen=True)
class Descent:
    """How steps are taken and looked at.

    Attributes:
        lr: Length of a step, at first.
        momentum: What a step keeps of those before, from 0 to less than 1.
        lr_decay: Multiplies `lr` every `lr_decay_interval` steps.
        lr_decay_interval: See there.
        measure_interval: After so many steps, and after the last one, residuals and objectives are
            measured.

    Raises:
        ValueError: If a value is out of range.
    """

    lr: float = 0.01
    momentum: float = 0.9
    lr_decay: float = 0.9
    lr_decay_interval: int = 100
    measure_interval: int = 10

    def __post_init__(self) -> None:
        for name, allowed, expected in (
            ("lr", self.lr > 0, "more than 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to less than 1"),
            ("lr_decay", 0 < self.lr_decay <= 1, "more than 0 and at most 1"),
            ("lr_decay_interval", self.lr_decay_interval > 0, "1 or more"),
            ("measure_interval", self.measure_interval > 0, "1 or more"),
        ):
            if not allowed:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")

    def lr_at(self, step: int) -> float:
        """Of the step of this number, counted from 0."""
        return self.lr * self.lr_decay ** (step // self.lr_decay_interval)


class Drawn(NamedTuple):
    """Documents of one step.

    Attributes:
        batches: This host's rows of them.
        documents: How many they are on all hosts, those without a label included.
    """

    batches: Iterable[PyTree[np.ndarray]]
    documents: int


def refine_by_sgd(
    problem: Problem | GaussNewtonPass,
    draw: Callable[[int], Drawn],
    held: Iterable[PyTree[np.ndarray]],
    queries: Vectors,
    factors: Factors,
    *,
    held_documents: int | None = None,
    steps: int = 200,
    tolerance: float = 1e-3,
    descent: Descent = Descent(),
    advance: Callable[[int], None] = lambda steps: None,
) -> Refined:
    """Solutions of (G + D) x = q for the Gauss-Newton Hessian that drawn documents have on average.

    Each query keeps the best x that was measured, the start included. On the devices are, beside
    the model and the factors, about eight arrays as large as all queries.

    Args:
        problem: A loss as for `gauss_newton_product`, model, linears and devices; or a
            `GaussNewtonPass` of such a problem, whose compilations then serve again.
        draw: Gives the documents of a step, by its number from 0 on; a step that is computed again
            must get the same ones.
        held: This host's rows of the documents on which residuals and objectives are measured.
        queries: q, gradients by module, [query, out, in].
        factors: H of the same modules, whose `inverse` says how it is damped: D is what it adds.
        held_documents: How many are held; by default the rows of `held` that are documents.
        steps: At most so many, each a product with G.
        tolerance: A query is done when its measured residual, relative to |q|, isn't larger.
        descent: How steps are taken.
        advance: Called after each step with 1, or with the number of steps that weren't needed.

    Returns:
        Solutions, none of whose objectives on the held documents is larger than at the start;
        residuals and objectives wherever they were measured.

    Raises:
        ConfigError: If the factors' inversion isn't one of `REFINABLE`.
        ValueError: If `steps` is negative, or queries and problem have different modules.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected 0 or more")
    equations, held = Equations(problem, queries, factors), list(held)
    held_documents, q = held_documents or equations.count(held), equations.q

    def measured(x: Solutions) -> tuple[np.ndarray, np.ndarray]:
        left = _left(q, equations.times(held, held_documents, x))
        residuals, objectives = measure(q, x, left)
        return fetch(residuals), fetch(objectives)

    x = best = precondition(factors, q)
    residual, objective = measured(x)
    residuals, objectives, taken = [residual], [objective], [0]
    kept, least = np.zeros(len(residual), np.int64), objective
    going = residual > tolerance
    b = jax.tree.map(lambda each: 0 * each, x)
    for step in range(steps):
        if not going.any():
            advance(steps - step)
            break
        batches, documents = draw(step)
        left = _left(q, equations.times(batches, documents, x))
        lengths = equations.put((descent.lr_at(step) * going).astype(residual.dtype))
        x, b = _step(factors, x, b, left, lengths, descent.momentum)
        advance(1)
        if (step + 1) % descent.measure_interval == 0 or step + 1 == steps:
            residual, objective = measured(x)
            better = going & (objective < least)  # not where it isn't a number any more
            kept, least = np.where(better, len(taken), kept), np.where(better, objective, least)
            best = keep(equations.put(better), x, best)
            going = going & (residual > tolerance) & np.isfinite(objective)
            residuals.append(residual)
            objectives.append(objective)
            taken.append(step + 1)
    return Refined(best, np.stack(residuals), np.stack(objectives), np.array(taken), kept)


@compiled
def _left(q: Solutions, ax: Solutions) -> Solutions:
    return {name: q[name] - ax[name] for name in q}


@compiled
def _step(
    factors: Factors,
    x: Solutions,
    b: Solutions,
    left: Solutions,
    lengths: Array,
    momentum: float | Array,
) -> tuple[Solutions, Solutions]:
    """One step; queries of length 0 stay where they are."""
    towards = factors.apply(left)
    b = {name: momentum * b[name] - towards[name] for name in b}
    return moved(x, -lengths, b), b
