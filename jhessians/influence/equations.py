"""(G + D) x = q for many q side by side: what its solvers share.

G is the Gauss-Newton Hessian, a mean over documents, D the damping of each module. Solvers start
from (H + D)⁻¹ q with the Kronecker factors' H, by which they are preconditioned, too.
"""

from collections.abc import Iterable
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
from jhessians.typing import Array, Float, Int, PyTree

REFINABLE = ("damped_inverse", "absolute_damped_inverse")
"""Inversions that add a multiple of the identity, as D is."""

Solutions = dict[str, Float[Array, "query _ _"]]


class Refined(NamedTuple):
    """Solutions, and how good they are.

    Attributes:
        solutions: x, module → [query, out, in].
        residuals: |q - (G + D) x| / |q| at each measurement, the first before the first step,
            [measurement, query].
        objectives: xᵀ (G + D) x / 2 - xᵀ q at the same points, [measurement, query].
        steps: How many steps had been taken then, [measurement].
        kept: Whose measurement's x the solution is, [query].
    """

    solutions: Solutions
    residuals: Float[np.ndarray, "measurement query"]
    objectives: Float[np.ndarray, "measurement query"]
    steps: Int[np.ndarray, " measurement"]
    kept: Int[np.ndarray, " query"]


class Equations:
    """The equations of some queries.

    Args:
        problem: A loss as for `gauss_newton_product`, model, linears and devices; or the pass of
            such a problem, whose compilations then serve again.
        queries: q, gradients by module, [query, out, in].
        factors: H of the same modules, whose `inverse` says how it is damped: D is what it adds.

    Attributes:
        q: The queries on the devices.

    Raises:
        ConfigError: If the factors' inversion isn't one of `REFINABLE`.
    """

    def __init__(self, problem: Problem | GaussNewtonPass, queries: Vectors, factors: Factors):
        inverse = factors.inverse
        if inverse.inversion not in REFINABLE:
            raise ConfigError(
                f"`inversion` is {inverse.inversion}, which adds no multiple of the identity; a "
                f"refinement expects {' or '.join(REFINABLE)}"
            )
        if isinstance(problem, Problem):
            problem = GaussNewtonPass(problem)
        self._products = problem
        self.put = self._products.put
        self._damping = {name: self.put(x) for name, x in _damping(factors, inverse).items()}
        self.q: Solutions = {name: self.put(x) for name, x in queries.items()}

    def times(
        self, batches: Iterable[PyTree[np.ndarray]], documents: int, vectors: Solutions
    ) -> Solutions:
        """(G + D) times vectors.

        Args:
            batches: This host's rows of the documents that G is the mean of.
            documents: How many they are.
            vectors: Any.

        Returns:
            As `vectors`.
        """
        product = self._products.run(batches, vectors)
        return _combined(product, vectors, self._damping, 1 / documents)

    def count(self, batches: list[PyTree[np.ndarray]]) -> int:
        """How many documents the batches of all hosts hold."""
        count = sum(map(_count, batches))
        return sum_of_hosts(count) if self._products.problem.mesh else count


def _count(batch: PyTree[np.ndarray]) -> int:
    numbers = document_ids(batch)
    if numbers is not None:
        return int((np.asarray(numbers) >= 0).sum())
    return len(jax.tree.leaves(batch)[0])


@compiled
def precondition(factors: Factors, vectors: Solutions) -> Solutions:
    """(H + D)⁻¹ times vectors."""
    applied: Solutions = factors.apply(vectors)
    return applied


@compiled
def measure(q: Solutions, x: Solutions, r: Solutions) -> tuple[Array, Array]:
    """How good solutions are; with r = q - (G + D) x an objective is -(q + r)ᵀ x / 2.

    Args:
        q: Queries.
        x: Solutions.
        r: What is left.

    Returns:
        Residuals |r| / |q|, and objectives, each [query].
    """
    square = dot(q, q)
    share = dot(r, r) / jnp.maximum(square, jnp.finfo(square.dtype).tiny)
    return jnp.sqrt(share), -(dot(q, x) + dot(r, x)) / 2


@compiled
def keep(chosen: Array, new: Solutions, old: Solutions) -> Solutions:
    """The new solutions of the chosen queries, the old ones of the others."""
    return jax.tree.map(lambda n, o: jnp.where(chosen[:, None, None], n, o), new, old)


def moved(start: Solutions, length: Array, direction: Solutions) -> Solutions:
    """Each query's solution, so far along its direction."""
    return jax.tree.map(lambda x, d: x + length[:, None, None] * d, start, direction)


def dot(left: Solutions, right: Solutions) -> Array:
    """Inner products over all modules, [query]."""
    parts = [jnp.einsum("koi,koi->k", left[name], right[name]) for name in left]
    return jnp.stack(parts).sum(0)


@compiled
def _combined(
    product: Solutions, vectors: Solutions, damping: dict[str, Array], share: float | Array
) -> Solutions:
    """(G + D) v of a sum over documents."""
    return {name: share * product[name] + damping[name] * v for name, v in vectors.items()}


def _damping(factors: Factors, inverse: Inverse) -> dict[str, np.ndarray]:
    """What the inverse adds to each module's eigenvalues."""
    kind = "eigenvalue_correction" if corrects(factors, inverse) else "eigenvalue"
    absolute = inverse.inversion == "absolute_damped_inverse"
    return {
        name: np.asarray(inverse.damping_factor * (1.0 if absolute else fetch(x).mean()))
        for name, x in factors[kind].items()
    }
