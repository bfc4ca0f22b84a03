"""What lies between the passes of a fit: the covariances' eigendecompositions, saved as they go."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

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
    place_rows,
)
from jhessians.fitting.eigensolver import Task, decompose
from jhessians.fitting.grace import Terminated, at_once
from jhessians.linalg.eigen import Eigen
from jhessians.typing import DTypeLike, PyTree

Stacks = dict[tuple[str, str], Eigen]
"""Eigenpairs on the host, by site and side, of stacks that aren't complete."""


class SavedBases(NamedTuple):
    """What an earlier run saved of the eigenpairs.

    Attributes:
        done: How many matrices' there are, from the first of `in_order` on.
        terms: How many terms were summed.
        bases: Those that are complete.
        stacks: Those that aren't.
    """

    done: int
    terms: TermCounts
    bases: Eigenbases
    stacks: Stacks


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
    done, _, bases, stacks = saved or SavedBases(0, terms, Eigenbases({}, {}), {})
    if done:
        advance(done)
    pending = Counter(map(_key, order[done:]))
    for matrix in order[:done]:
        if not pending[_key(matrix)]:
            statistics[matrix.site.name].pop(matrix.side, None)
    unread = pending.copy()

    def task(matrix: Matrix) -> Task:
        def read() -> np.ndarray:
            whole, key = matrix.read(statistics), _key(matrix)
            unread[key] -= 1
            if not unread[key]:
                del statistics[matrix.site.name][matrix.side]
            return whole

        return Task(matrix.name, matrix.dimension, terms.of(matrix.site, matrix.slot), read)

    pairs = decompose([task(matrix) for matrix in order[done:]], dtype)
    for matrix in order[done:]:
        try:
            # One host may end while it waits: what it has is saved here.
            with at_once() if problem.hosts == 1 else nullcontext():
                pair = next(pairs)
        except Terminated:
            kept.save(_position(done, terms), _arrays(bases, stacks))
            raise
        site, side, slot = matrix
        key = _key(matrix)
        if slot is None:
            stacks[key] = pair
        else:
            stack = stacks.setdefault(key, _empty_stack(len(site.members or ()), *pair))
            stack.values[slot], stack.vectors[slot] = pair
        pending[key] -= 1
        if not pending[key]:
            ready = stacks.pop(key)
            bases.values.setdefault(site.name, {})[side] = ready.values
            rows = place_rows(ready.vectors, problem.mesh, axis=ready.vectors.ndim - 2)
            bases.vectors.setdefault(site.name, {})[side] = rows
        done += 1
        advance(1)
        if done < len(order) and kept.due():
            kept.save(_position(done, terms), _arrays(bases, stacks))
    return bases


def in_order(sites: Mapping[str, Site]) -> list[Matrix]:
    """All matrices in the order in which they are decomposed, the largest first.

    Args:
        sites: The linears.

    Returns:
        As from `covariance_matrices`.
    """
    return sorted(covariance_matrices(sites), key=lambda matrix: -matrix.dimension)


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
        stacks: dict[tuple[str, str], Any] = {}
        rest = set(map(_key, order[position["matrices"] :]))
        for name, side in map(_key, order[: position["matrices"]]):
            if (name, side) in rest:
                stacks[name, side] = (on_host, on_host)
            else:
                bases.vectors.setdefault(name, {})[side] = shapes[name][side]
                bases.values.setdefault(name, {})[side] = on_host
        return bases, stacks

    saved = kept.load(like)
    if saved is None:
        return None
    routed = {name: np.array(each) for name, each in saved.position["routed"].items()}
    bases, stacks = saved.arrays
    stacks = {key: Eigen(*pair) for key, pair in stacks.items()}
    return SavedBases(saved.position["matrices"], TermCounts(total, routed), bases, stacks)


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
    kept.finish(_position(len(covariance_matrices(sites)), terms), _arrays(bases, {}))


def _position(done: int, terms: TermCounts) -> dict[str, Any]:
    return {"matrices": done, "routed": {name: x.tolist() for name, x in terms.routed.items()}}


def _arrays(bases: Eigenbases, stacks: Stacks) -> PyTree[Any]:
    """What is saved of eigenpairs, as one tree."""
    return bases, {key: tuple(pair) for key, pair in stacks.items()}


def _key(matrix: Matrix) -> tuple[str, str]:
    return matrix.site.name, matrix.side


def _empty_stack(layers: int, *entries: np.ndarray) -> Eigen:
    return Eigen(*(np.empty((layers, *x.shape), x.dtype) for x in entries))
