"""What lies between the passes of a fit: the covariances' eigendecompositions, saved as they go."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np

from jhessians.capture.problem import Problem
from jhessians.capture.site import Site, Statistics
from jhessians.fitting.checkpoints import Series
from jhessians.fitting.eigenbases import (
    Eigenbases,
    Matrix,
    TermCounts,
    covariance_matrices,
    eigenvector_shapes,
    in_order,
)
from jhessians.fitting.eigensolver import Round, Task, everyones_values, rounds, solve_rounds
from jhessians.fitting.grace import Terminated, at_once
from jhessians.fitting.moving import bring, keep, spread
from jhessians.typing import DTypeLike, PyTree


class SavedBases(NamedTuple):
    """What an earlier run saved of the eigenpairs.

    Attributes:
        done: How many matrices' there are, from the first of `in_order` on.
        terms: How many terms were summed.
        bases: Theirs; a stack has zeros for those that don't exist yet.
    """

    done: int
    terms: TermCounts
    bases: Eigenbases


def eigendecompose_covariances(
    problem: Problem,
    statistics: Statistics,
    *,
    terms: TermCounts,
    dtype: np.dtype,
    advance: Callable[[int], None] = lambda matrices: None,
    saved: SavedBases | None = None,
    kept: Series | None = None,
) -> Eigenbases:
    """Eigenpairs of every covariance's mean over its terms, the work divided among hosts.

    Args:
        problem: Sites and mesh.
        statistics: Of `Covariance`; emptied on the way, so that a covariance's memory is free
            once all of its stack is on its way to an eigensolver.
        terms: How many terms were summed.
        dtype: Of the result.
        advance: Called when matrices are done, with how many.
        saved: What an earlier run saved of them.
        kept: Where they are saved meanwhile; not at the end.

    Returns:
        Eigenvectors on the devices, and eigenvalues on every host.

    Raises:
        NumericsError: If a matrix isn't finite; it is named.
    """
    kept = kept or Series()
    order = in_order(problem.sites)
    done, _, bases = saved or SavedBases(0, terms, Eigenbases({}, {}))
    if done:
        advance(done)
    unread = Counter(map(_key, order[done:]))
    for matrix in order[:done]:
        if not unread[_key(matrix)]:
            statistics[matrix.site.name].pop(matrix.side, None)
    rest = order[done:]
    tasks = [Task(each.name, each.dimension, terms.of(each.site, each.slot)) for each in rest]

    def matrices(among: Round) -> dict[int, Matrix]:
        return {host: rest[number] for number, _, host in among}

    def read(among: Round) -> np.ndarray | None:
        whole = bring(matrices(among), statistics, problem)
        for site, side in map(_key, matrices(among).values()):
            unread[site, side] -= 1
            if not unread[site, side]:
                del statistics[site][side]
        return whole

    pairs = solve_rounds(rounds(tasks, problem.hosts), read, dtype, problem.hosts)
    while done < len(order):
        try:
            # One host may end while it waits: what it has is saved here.
            with at_once() if problem.hosts == 1 else nullcontext():
                among, pair = next(pairs)
        except Terminated:
            kept.save(_position(done, terms), _as_it_is(bases))
            raise
        values = everyones_values(among, pair, dtype, problem.hosts)
        vectors = spread(matrices(among), None if pair is None else pair.vectors, dtype, problem)
        for own, (host, matrix) in zip(values, matrices(among).items(), strict=True):
            keep(bases, matrix, own, vectors[host], problem.mesh)
        done += len(among)
        advance(len(among))
        if done < len(order) and kept.due():
            kept.save(_position(done, terms), _as_it_is(bases))
    return bases


def load_eigenbases(
    problem: Problem, dtype: DTypeLike, kept: Series, *, total: int
) -> SavedBases | None:
    """What an earlier run saved of the eigenpairs.

    Args:
        problem: Sites and mesh.
        dtype: Number format of the eigenvectors.
        kept: The states.
        total: How many terms were summed.

    Returns:
        None if nothing was saved.
    """
    order, shapes = in_order(problem.sites), eigenvector_shapes(problem, dtype)
    on_host = np.dtype(dtype)

    def like(position: Mapping[str, Any]) -> PyTree[Any]:
        bases: Any = Eigenbases({}, {})
        for name, side in map(_key, order[: position["matrices"]]):
            bases.vectors.setdefault(name, {})[side] = shapes[name][side]
            bases.values.setdefault(name, {})[side] = on_host
        return bases

    saved = kept.load(like)
    if saved is None:
        return None
    routed = {name: np.array(each) for name, each in saved.position["routed"].items()}
    bases = _as_it_is(saved.arrays)
    return SavedBases(saved.position["matrices"], TermCounts(total, routed), bases)


def finish_eigenbases(
    bases: Eigenbases, terms: TermCounts, sites: Mapping[str, Site], kept: Series
) -> None:
    """Save all eigenpairs.

    Args:
        bases: Of all matrices.
        terms: How many terms were summed.
        sites: The linears.
        kept: Where to.
    """
    kept.finish(_position(len(covariance_matrices(sites)), terms), bases)


def _position(done: int, terms: TermCounts) -> dict[str, Any]:
    return {"matrices": done, "routed": {name: x.tolist() for name, x in terms.routed.items()}}


def _as_it_is(bases: Eigenbases) -> Eigenbases:
    """The same with eigenvalues that nobody writes to when more of them come."""
    return bases._replace(values=jax.tree.map(np.copy, bases.values))


def _key(matrix: Matrix) -> tuple[str, str]:
    return matrix.site.name, matrix.side
