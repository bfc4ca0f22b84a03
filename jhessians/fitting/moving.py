"""Matrices on their way from the devices to the hosts that decompose them, and eigenvectors back.

No host gets more than the matrices that it works on: with several, each round of the exchange
brings one to each, and takes one from each.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from jhessians.capture.problem import Problem
from jhessians.capture.site import Statistics
from jhessians.devices.exchange import Exchange
from jhessians.devices.mesh import axis_names
from jhessians.fitting.eigenbases import Eigenbases, Matrix, place_rows
from jhessians.linalg.symmetric import unpack
from jhessians.typing import Array, DTypeLike


def bring(
    matrices: Mapping[int, Matrix], statistics: Statistics, problem: Problem
) -> Float[np.ndarray, "d d"] | None:
    """Bring each matrix to its host, where it is unpacked; all hosts call this.

    Args:
        matrices: Host → its matrix; all of one dimension.
        statistics: Packed factors.
        problem: Says over which devices they are spread.

    Returns:
        This host's, whole; None if it has none.
    """
    if problem.hosts == 1:
        (matrix,) = matrices.values()
        return matrix.read(statistics)
    assert problem.mesh is not None
    exchange = Exchange(problem.mesh)

    def blocks() -> Iterator[np.ndarray | None]:
        stacks = {host: matrix.stacks(statistics) for host, matrix in matrices.items()}
        for k in range(len(next(iter(stacks.values())))):
            yield exchange.bring(
                {host: _member(stacks[host][k], matrix.slot) for host, matrix in matrices.items()}
            )

    mine = matrices.get(jax.process_index())
    if mine is not None:
        return unpack(cast(Iterator[np.ndarray], blocks()), mine.dimension)
    for _ in blocks():
        pass
    return None


def spread(
    matrices: Mapping[int, Matrix],
    vectors: Float[np.ndarray, "d d"] | None,
    dtype: DTypeLike,
    problem: Problem,
) -> dict[int, Array]:
    """Spread the rows of each matrix's eigenvectors over the devices; all hosts call this.

    Args:
        matrices: As in `bring`.
        vectors: Of this host's matrix; None if it has none.
        dtype: Their number format.
        problem: Says over which devices.

    Returns:
        Host → [row, d], rows padded with zeros to a multiple of the devices.
    """
    if problem.hosts == 1:
        assert vectors is not None
        (host,) = matrices
        return {host: place_rows(vectors, problem.mesh, axis=0)}
    assert problem.mesh is not None
    d = next(iter(matrices.values())).dimension
    everyones = Exchange(problem.mesh).spread(vectors, (d, d), dtype)
    return {host: everyones[host] for host in matrices}


def keep(
    bases: Eigenbases,
    matrix: Matrix,
    values: Float[np.ndarray, " d"],
    vectors: Float[Array, "r d"],
    mesh: Mesh | None,
) -> None:
    """Put a matrix's eigenpairs in their place; a stack has zeros for those that don't exist yet.

    Args:
        bases: Get them.
        matrix: Whose they are.
        values: Eigenvalues.
        vectors: Eigenvectors, their rows padded and spread over the devices.
        mesh: The devices.
    """
    site, side, slot = matrix
    all_values = bases.values.setdefault(site.name, {})
    all_vectors = bases.vectors.setdefault(site.name, {})
    if slot is None:
        all_values[side], all_vectors[side] = values, vectors
        return
    empty, put = _stack_of(len(site.slots), vectors.shape, vectors.dtype, mesh)
    if side not in all_vectors:
        all_values[side] = np.zeros((len(site.slots), *values.shape), values.dtype)
        all_vectors[side] = empty()
    all_values[side][slot] = values
    all_vectors[side] = put(all_vectors[side], vectors, np.int32(slot))


@lru_cache
def _stack_of(
    layers: int, shape: tuple[int, int], dtype: DTypeLike, mesh: Mesh | None
) -> tuple[Callable[[], Array], Callable[..., Array]]:
    """What makes a stack [layer, row, d] of zeros, and what puts a member into it, in place."""
    sharding = None if mesh is None else NamedSharding(mesh, P(None, axis_names(mesh)))
    empty = jax.jit(lambda: jnp.zeros((layers, *shape), dtype), out_shardings=sharding)
    put = jax.jit(
        partial(lax.dynamic_update_index_in_dim, axis=0),
        donate_argnums=0, out_shardings=sharding,
    )  # fmt: skip
    return empty, put


def _member(stack: Array, slot: int | None) -> Array:
    return stack if slot is None else _indexed(stack, np.int32(slot))


@jax.jit
def _indexed(stack: Array, slot: Array) -> Array:
    return lax.dynamic_index_in_dim(stack, slot, axis=0, keepdims=False)
