"""Which damping a Hessian needs: what its inverse is worth on documents that it wasn't fitted to.

For each damping factor c the factors give x = (H + D)⁻¹ q, D = c · mean eigenvalue of each module.
G is the Gauss-Newton Hessian of held-out documents, an unbiased estimate of that of the data, and

    gain = (qᵀx)² / (xᵀ G x) / ((qᵀq)² / (qᵀ G q))

is what the best multiple of x takes off the quadratic xᵀ G x / 2 - qᵀ x, relative to what the best
multiple of the plain gradient does. It is 1 for c → ∞, where x becomes q, is largest for the true
G⁻¹ q, and falls again where c is so small that H's noise, in directions of which it has seen
nothing, makes up x. So it has a maximum within, and doesn't depend on the length of x, which
changes no ranking of scores.

The residual |q - (G + D) x| / |q|, from which a refinement starts, is no such measure: D is part of
it, and where D is far above all curvature it vanishes for any H. With D left out it is dominated by
the few directions of the largest curvature, which no damping changes. It is returned all the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from jhessians.capture.problem import Problem
from jhessians.devices.hosts import fetch
from jhessians.influence.gauss_newton import GaussNewtonPass
from jhessians.influence.halves import Arrays, eigen_of, multiplier
from jhessians.typing import PyTree

Gradients = Mapping[str, Shaped[np.ndarray, "query _ _"]]


INDIFFERENT = 0.02
"""Damping factors whose gains differ by no more than this share are as good."""


class Trial(NamedTuple):
    """What each damping factor is worth.

    Attributes:
        dampings: c, as given.
        gains: [damping, query]; see the module.
        residuals: |q - (G + D) x| / |q|, [damping, query].
    """

    dampings: tuple[float, ...]
    gains: Float[np.ndarray, "damping query"]
    residuals: Float[np.ndarray, "damping query"]


class Choice(NamedTuple):
    """Which damping factor to take.

    Attributes:
        damping: The largest that is as good as the best: an inverse with more damping errs less.
        gain: What it is worth, the geometric mean over queries.
        best: The factor that is worth most.
        best_gain: What that one is worth.
        at_end: "smallest" or "largest" if `damping` is the first or the last of those that were
            tried, so that one beyond it might be better; else "".
    """

    damping: float
    gain: float
    best: float
    best_gain: float
    at_end: str


def try_dampings(
    problem: Problem,
    batches: Iterable[PyTree[np.ndarray]],
    queries: Gradients,
    factors: Arrays,
    dampings: Sequence[float],
    *,
    documents: int,
    advance: Callable[[int], None] = lambda dampings: None,
) -> Trial:
    """The gains and residuals of several damping factors.

    In memory are, beside the model, about five arrays as large as all queries.

    Args:
        problem: A loss as for `gauss_newton_product`, model, linears and devices.
        batches: This host's rows of the held-out documents.
        queries: q, gradients by module, [query, out, in].
        factors: Kind → module → array, fitted to neither the documents nor the queries.
        dampings: c, all positive.
        documents: How many the held-out documents are.
        advance: Called with 1 after each damping factor.

    Returns:
        Numbers for each factor and query; NaN for a query whose gradient is zero.
    """
    batches, products = list(batches), GaussNewtonPass(problem)
    q = {name: np.asarray(x, np.float64) for name, x in queries.items()}
    eigens = {name: eigen_of(factors, name) for name in q}

    def product(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        narrow = {name: x.astype(queries[name].dtype) for name, x in vectors.items()}
        found = products.run(batches, narrow)
        return {name: fetch(x).astype(np.float64) / documents for name, x in found.items()}

    with np.errstate(divide="ignore", invalid="ignore"):
        plain = np.square(_dot(q, q)) / _dot(q, product(q))
        gains, residuals = [], []
        for damping in dampings:
            x, damped = {}, {}
            for name, eigen in eigens.items():
                rotated = eigen.of_gradient.T @ q[name] @ eigen.of_activation
                scaled = multiplier(eigen.values, damping) * rotated
                x[name] = eigen.of_gradient @ scaled @ eigen.of_activation.T
                damped[name] = damping * eigen.values.mean() * x[name]
            gx = product(x)
            gains.append(np.square(_dot(q, x)) / _dot(x, gx) / plain)
            left = {name: q[name] - gx[name] - damped[name] for name in q}
            residuals.append(np.sqrt(_dot(left, left) / _dot(q, q)))
            advance(1)
    return Trial(tuple(dampings), np.stack(gains), np.stack(residuals))


def mean_gains(gains: Float[np.ndarray, "damping query"]) -> Float[np.ndarray, " damping"]:
    """Geometric means over queries.

    Args:
        gains: Of each factor and query; queries with a number that isn't finite and positive are
            left out.

    Returns:
        A mean for each factor; NaN if no query is left.
    """
    logs = _logarithms(gains)
    means: np.ndarray = np.exp(logs.mean(1)) if logs.size else np.full(len(gains), np.nan)
    return means


def choose(dampings: Sequence[float], gains: Float[np.ndarray, "damping query"]) -> Choice | None:
    """The largest damping factor that is as good as the one with the largest mean gain.

    As good is one whose mean logarithm falls short by at most `INDIFFERENT`, or by the standard
    error of that difference over queries.

    Args:
        dampings: c, ascending.
        gains: As in `mean_gains`.

    Returns:
        The factor; None if no query has gains.
    """
    logs = _logarithms(gains)
    if not logs.size:
        return None
    means = logs.mean(1)
    best = int(means.argmax())
    short = logs[best] - logs
    count = short.shape[1]
    errors = short.std(1, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(len(short))
    as_good = short.mean(1) <= np.maximum(errors, INDIFFERENT)
    chosen = int(np.flatnonzero(as_good)[-1])
    end = {0: "smallest", len(dampings) - 1: "largest"}.get(chosen, "")
    gain, best_gain = np.exp(means[[chosen, best]]).tolist()
    return Choice(dampings[chosen], gain, dampings[best], best_gain, end)


def _logarithms(gains: Float[np.ndarray, "damping query"]) -> Float[np.ndarray, "damping usable"]:
    usable = (np.isfinite(gains) & (gains > 0)).all(0)
    return np.log(gains[:, usable])


def _dot(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> np.ndarray:
    """Inner products over all modules, [query]."""
    return np.stack([(left[name] * right[name]).sum((1, 2)) for name in left]).sum(0)
