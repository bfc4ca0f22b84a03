"""Eigendecompositions of many symmetric matrices, the work divided among hosts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

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
    """

    name: str
    dimension: int
    count: int


class Owned(NamedTuple):
    """A task, and the host that solves it.

    Attributes:
        number: The task's place among all tasks.
        task: What to decompose.
        host: That host.
    """

    number: int
    task: Task
    host: int

    @property
    def is_mine(self) -> bool:
        """Whether this host solves it."""
        return self.host == jax.process_index()


Round = list[Owned]
"""Tasks of one dimension that different hosts solve."""


def rounds(tasks: Sequence[Task], hosts: int) -> list[Round]:
    """Divide tasks among hosts, about equally costly, as many at a time as there are hosts.

    Args:
        tasks: In the same order on every host.
        hosts: How many there are; a single one is this one.

    Returns:
        The tasks in their order. All hosts have the same rounds.
    """
    found: list[Round] = []
    for owned in _owned(tasks, hosts):
        last = found[-1] if found else []
        if (
            not last
            or owned.task.dimension != last[0].task.dimension
            or any(owned.host == other.host for other in last)
        ):
            found.append([owned])
        else:
            last.append(owned)
    return found


def solve_rounds(
    among: Sequence[Round],
    bring: Callable[[Round], Float[np.ndarray, "_ _"] | None],
    dtype: np.dtype,
    hosts: int,
) -> Iterator[tuple[Round, Eigen | None]]:
    """Eigenpairs of each task's mean (C + Cᵀ) / (2 count), on the host that solves it.

    Args:
        among: From `rounds`.
        bring: Brings each sum C to its host; returns this host's whole, or None if it has none.
            Called once for each round, in their order, by all hosts.
        dtype: Number format of the result; the computation is in float64.
        hosts: As for `rounds`.

    Yields:
        Each round, with this host's eigenvalues [d], ascending, and eigenvectors [d, d] as columns;
        None if it has none.

    Raises:
        NumericsError: With one host, if a matrix isn't finite or LAPACK doesn't converge. With
            several, the pair holds NaN, which `everyones_values` tells all of them.
    """
    largest = max((each[0].task.dimension for each in among), default=1)
    # A host has a matrix in every round, or in every second one, and so on.
    turns = round(hosts * len(among) / max(1, sum(map(len, among))))
    sums = ((each, bring(each)) for each in among)
    solved = partial(_solved, dtype=dtype, hosts=hosts)
    pairs = side_by_side(solved, sums, largest, turns=max(1, turns))
    yield from zip(among, pairs, strict=True)


def everyones_values(
    among: Round, pair: Eigen | None, dtype: np.dtype, hosts: int
) -> Float[np.ndarray, "_ _"]:
    """The eigenvalues of all tasks of a round, on every host.

    Args:
        among: The round.
        pair: This host's eigenpairs; None if it has none.
        dtype: Number format of the result.
        hosts: As for `rounds`.

    Returns:
        [task, d].

    Raises:
        NumericsError: On every host, if a matrix has no eigendecomposition; it is named.
    """
    values = np.zeros(among[0].task.dimension, dtype) if pair is None else pair.values
    if hosts == 1:
        found = values[None]
    else:
        from jax.experimental import multihost_utils

        found = multihost_utils.process_allgather(values)[[host for _, _, host in among]]
    for each, own in zip(among, found, strict=True):
        if not np.isfinite(own).all():
            raise NumericsError(
                f"{each.task.name} holds NaN or infinity, or has no eigendecomposition; expected "
                "finite numbers: check the weights, or compute in float32 (`precision` fp32)"
            )
    return found


def decompose(
    tasks: Sequence[Task], read: Callable[[int], Float[np.ndarray, "_ _"]], dtype: np.dtype
) -> Iterator[Eigen]:
    """Eigenpairs of each task's mean, on every host, in the tasks' order.

    Args:
        tasks: In the same order on every host; each host solves some.
        read: Brings a task's whole sum to every host, by its place among them; called as
            `solve_rounds` calls `bring`.
        dtype: Number format of the result.

    Yields:
        Eigenvalues [d], ascending, and eigenvectors [d, d] as columns.

    Raises:
        NumericsError: On every host, if a matrix isn't finite or LAPACK doesn't converge; the
            matrix is named.
    """

    def bring(each: Round) -> Float[np.ndarray, "_ _"] | None:
        ((number, _, _),) = each
        whole = read(number)
        return whole if each[0].is_mine else None

    hosts = jax.process_count()
    alone = [[owned] for owned in _owned(tasks, hosts)]
    for each, pair in solve_rounds(alone, bring, dtype, hosts):
        (values,) = everyones_values(each, pair, dtype, hosts)
        yield Eigen(values, _from_owner(pair, each[0], dtype))


def _owned(tasks: Sequence[Task], hosts: int) -> Iterator[Owned]:
    owners = share_by_cost([task.dimension for task in tasks], hosts)
    for number, (task, host) in enumerate(zip(tasks, owners, strict=True)):
        yield Owned(number, task, host if hosts > 1 else jax.process_index())


def _solved(
    item: tuple[Round, Float[np.ndarray, "_ _"] | None], dtype: np.dtype, hosts: int
) -> Eigen | None:
    among, whole = item
    if whole is None:
        return None
    task = next(each.task for each in among if each.is_mine)
    try:
        return eigendecompose(task.name, whole, task.count, dtype)
    except NumericsError:
        if hosts == 1:
            raise
        # The others wait for a result, and see from this one that there is none.
        return Eigen(*(np.full((task.dimension,) * n, np.nan, dtype) for n in (1, 2)))


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
    solve: Callable[[Item], Result], items: Iterable[Item], dimension: int, *, turns: int = 1
) -> Iterator[Result]:
    """Solve every item, as many at a time as cores and memory allow.

    Args:
        solve: An eigendecomposition.
        items: In the same order on every host; each solves its own and passes over the others'.
        dimension: Rows of the largest matrix.
        turns: A host solves one of so many items.

    Returns:
        What `solve` returns, in the order of `items`.
    """
    workers = eigendecompositions_at_once(dimension)
    return ordered_map(
        solve, items, workers=workers, window=(workers + 1) * turns,
        blas_threads=max(1, usable_cores() // workers),
    )  # fmt: skip


def _from_owner(pair: Eigen | None, owned: Owned, dtype: np.dtype) -> Float[np.ndarray, "d d"]:
    """The eigenvectors that one host computed, on every host.

    Args:
        pair: The result, on that host.
        owned: Says which host.
        dtype: Number format of the result.

    Returns:
        The owner's result.
    """
    if jax.process_count() == 1:
        assert pair is not None
        return pair.vectors
    from jax.experimental import multihost_utils

    d = owned.task.dimension
    mine = np.empty((d, d), dtype) if pair is None else pair.vectors
    return np.asarray(multihost_utils.broadcast_one_to_all(mine, is_source=owned.is_mine))
