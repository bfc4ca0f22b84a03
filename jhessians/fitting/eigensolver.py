"""Eigendecompositions of many symmetric matrices, the work divided among hosts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Float

from jhessians.errors import NumericsError
from jhessians.fitting.memory import eigendecompositions_at_once
from jhessians.linalg.eigen import Eigen, eigendecompose, ordered_map, share_by_cost, usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """One matrix to decompose.

    Attributes:
        name: What it is, for messages.
        dimension: d.
        count: Terms in the sum that it is, at least 1; its mean is decomposed.
        read: Brings the whole sum [d, d] to every host. Called once, in the tasks' order, by all.
    """

    name: str
    dimension: int
    count: int
    read: Callable[[], Float[np.ndarray, "d d"]]


def decompose(tasks: Sequence[Task], dtype: np.dtype) -> Iterator[Eigen]:
    """Eigenpairs of each task's mean (C + Cᵀ) / (2 count), on every host, in the tasks' order.

    Args:
        tasks: In the same order on every host; each host solves some, about equally costly.
        dtype: Number format of the result; the computation is in float64.

    Yields:
        Eigenvalues [d], ascending, and eigenvectors [d, d] as columns.

    Raises:
        NumericsError: On every host, if a matrix isn't finite or LAPACK doesn't converge; the
            matrix is named.
    """
    hosts, host = jax.process_count(), jax.process_index()
    owners = share_by_cost([task.dimension for task in tasks], hosts)

    def sums() -> Iterator[tuple[Task, Float[np.ndarray, "d d"] | None]]:
        for task, owner in zip(tasks, owners, strict=True):
            whole = task.read()
            yield task, whole if owner == host else None

    def solve(item: tuple[Task, Float[np.ndarray, "d d"] | None]) -> Eigen | None:
        task, whole = item
        if whole is None:
            return None
        try:
            return eigendecompose(task.name, whole, task.count, dtype)
        except NumericsError:
            if hosts == 1:
                raise
            # The others wait for a result, and see from this one that there is none.
            return Eigen(*(np.full((task.dimension,) * n, np.nan, dtype) for n in (1, 2)))

    largest = max((task.dimension for task in tasks), default=1)
    for task, owner, pair in zip(tasks, owners, side_by_side(solve, sums(), largest), strict=True):
        everyones = _from_owner(pair, owner, task.dimension, dtype)
        if not np.isfinite(everyones.values).all():
            raise NumericsError(
                f"{task.name} holds NaN or infinity, or has no eigendecomposition; expected "
                "finite numbers: check the weights, or compute in float32 (`precision` fp32)"
            )
        yield everyones


def seconds_of(dimensions: Iterable[int], cores: int | None = None) -> float:
    """About how long cores take to decompose matrices: measured, 16 core-seconds for 4096 rows.

    Args:
        dimensions: Rows of each matrix.
        cores: How many share the work; by default those that this process may use.

    Returns:
        Seconds.
    """
    return 16 * sum((d / 4096) ** 3 for d in dimensions) / (cores or usable_cores())


def side_by_side(
    solve: Callable[[Item], Result], items: Iterable[Item], dimension: int
) -> Iterator[Result]:
    """Solve every item, as many at a time as cores and memory allow.

    Args:
        solve: An eigendecomposition.
        items: In the same order on every host; each solves its own and passes over the others'.
        dimension: Rows of the largest matrix.

    Returns:
        What `solve` returns, in the order of `items`.
    """
    workers = eigendecompositions_at_once(dimension)
    return ordered_map(
        solve, items, workers=workers, window=(workers + 1) * jax.process_count(),
        blas_threads=max(1, usable_cores() // workers),
    )  # fmt: skip


def _from_owner(pair: Eigen | None, owner: int, d: int, dtype: np.dtype) -> Eigen:
    """The eigenpairs that one host computed, [d] and [d, d], on every host.

    Args:
        pair: The result, on that host.
        owner: That host.
        d: Rows of the matrix.
        dtype: Number format of the result.

    Returns:
        The owner's result.
    """
    if jax.process_count() == 1:
        assert pair is not None
        return pair
    from jax.experimental import multihost_utils

    mine = pair or Eigen(np.empty(d, dtype), np.empty((d, d), dtype))
    shared = multihost_utils.broadcast_one_to_all(mine, is_source=owner == jax.process_index())
    return Eigen(*(np.asarray(x) for x in shared))
