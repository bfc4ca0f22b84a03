"""Eigendecomposition of symmetric positive semi-definite matrices in float64 on the host.

LAPACK's divide and conquer (evd) computes in float64, because in float32 the spectrum of a
covariance has hundreds of negative eigenvalues. Matrices are decomposed side by side, the costliest
first, on one core each; where memory holds fewer of them than there are cores, each gets several.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from jhessians.errors import NumericsError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Eigen(NamedTuple):
    """Eigenvalues, ascending, and eigenvectors as columns."""

    values: Float[np.ndarray, " d"]
    vectors: Float[np.ndarray, "d d"]


def eigendecompose(
    name: str, matrix: Float[np.ndarray, "d d"], count: int, dtype: np.dtype
) -> Eigen:
    """Eigenpairs of (C + Cᵀ) / (2 count).

    Args:
        name: Names the matrix in errors.
        matrix: C, a sum over positions; not changed.
        count: How many positions were summed; at least 1.
        dtype: Number format of the result. The computation is in float64.

    Returns:
        Eigenvalues [d], ascending, and eigenvectors [d, d], one per column.

    Raises:
        NumericsError: If C isn't finite, or LAPACK does not converge.
    """
    if not np.isfinite(matrix).all():
        raise NumericsError(
            f"{name} holds NaN or infinity; expected finite numbers: check the weights, "
            "or compute in float32 (`precision` fp32)"
        )
    symmetric = matrix.astype(np.float64)
    symmetric += matrix.T
    symmetric /= 2 * count
    try:
        # numpy's, which lets other threads run: scipy's wrapper of the same routine holds the
        # interpreter's lock, so that two threads took as long as one.
        values, vectors = np.linalg.eigh(symmetric)
    except np.linalg.LinAlgError as error:
        raise NumericsError(
            f"the eigendecomposition of {name} did not converge: {error}"
        ) from error
    return Eigen(values.astype(dtype), np.ascontiguousarray(vectors.astype(dtype)))


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    window: int,
    blas_threads: int = 1,
) -> Iterator[Result]:
    """`function` of every item, in order, on threads side by side.

    Args:
        function: May raise, which ends the iteration.
        items: Iterated on the caller's thread.
        workers: Number of threads.
        window: How many items are taken before the first result must be ready, so that neither
            all inputs nor all results are in memory at once.
        blas_threads: Threads that BLAS may use in each call.

    Yields:
        Results, in the order of `items`.
    """
    items = iter(items)
    waiting: deque[Future[Result]] = deque()
    with threadpool_limits(limits=blas_threads, user_api="blas"):
        pool = ThreadPoolExecutor(workers)
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # An interrupted run does not wait for LAPACK, which cannot be stopped.
            pool.shutdown(wait=False, cancel_futures=True)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_by_cost(dimensions: Sequence[int], hosts: int) -> list[int]:
    """Which host decomposes each matrix, so that their costs, d³ each, are about equal.

    The costliest go first, each to the host that has least to do.

    Returns:
        Number of the host, one for each matrix.
    """
    owners = [0] * len(dimensions)
    loads = [0] * hosts
    for i in sorted(range(len(dimensions)), key=lambda i: -dimensions[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += dimensions[i] ** 3
    return owners
