"""Small programs whose fullest moment can be told by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jhessians.planning.liveness import peak_bytes
from jhessians.planning.program import as_soon_as_possible, trace
from jhessians.planning.traffic import moved_bytes, sent_bytes

N = 100
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.float32)
BYTES = 4 * N * N


def peak(function, *arguments, reusable=(), order=None):
    return peak_bytes(trace(function, *arguments), reusable, order=order) / BYTES


def test_products_are_stored_until_they_are_read_for_the_last_time():
    def chain(x):
        return x @ x @ x @ x @ x  # two at a time

    def all_at_once(x):
        a, b, c = x @ x, x.T @ x, x @ x.T
        return a @ b @ c

    assert peak(chain, MATRIX) == 2
    assert peak(all_at_once, MATRIX) == 4


def test_what_lies_between_products_is_not_stored():
    assert peak(lambda x: jnp.sum(jnp.exp(jnp.sin(x) * 2 + x)), MATRIX) < 0.01
    # A product reads it from memory, so it must be there.
    assert peak(lambda x: jnp.exp(x) @ x, MATRIX) == 2
    # It is computed from x @ x, which has to live until then.
    assert peak(lambda x: jnp.sum(jnp.exp(x @ x) * (x @ x.T)), MATRIX) == pytest.approx(2, abs=0.01)


def test_a_dead_array_of_the_same_size_is_written_over():
    assert peak(lambda x: jnp.exp(x @ x), MATRIX) == 1
    assert peak(lambda x: x + 1, MATRIX) == 1
    assert peak(lambda x: x + 1, MATRIX, reusable=[0]) == 0
    assert peak(lambda x: (x @ x).at[0].set(0.0), MATRIX) == pytest.approx(1, abs=0.02)


def test_a_loop_carries_its_sum_in_place():
    stack = jax.ShapeDtypeStruct((8, N, N), jnp.float32)

    def total(start, xs):
        return lax.scan(lambda sum, x: (sum + x @ x, None), start, xs)[0]

    def rows(start, xs):
        def add(sums, x):
            return sums.at[x[1].astype(int)].add(x[0] @ x[0]), None

        return lax.scan(add, start, (xs, jnp.arange(8.0)))[0]

    assert peak(total, MATRIX, stack) == 2  # a copy of the start, and a product
    assert peak(total, MATRIX, stack, reusable=[0]) == 1
    assert peak(rows, stack, stack, reusable=[0]) == pytest.approx(1, abs=0.01)
    assert peak(rows, stack, stack) == pytest.approx(9, abs=0.01)
    # What every round leaves is stacked.
    assert peak(lambda xs: lax.map(lambda x: x @ x, xs), stack) >= 8


def test_a_branch_takes_what_its_fullest_takes():
    def branch(x, i):
        return lax.switch(i, [lambda x: x, lambda x: (x @ x) @ (x @ x.T), lambda x: x @ x], x)

    assert peak(branch, MATRIX, jax.ShapeDtypeStruct((), jnp.int32)) == pytest.approx(3, abs=0.01)


def test_calls_are_seen_through():
    def cube(x):
        return x @ x @ x

    inner = jax.jit(cube)
    assert peak(lambda x: inner(inner(x)), MATRIX) == peak(lambda x: cube(cube(x)), MATRIX) == 3
    assert peak(jax.checkpoint(lambda x: x @ x @ x), MATRIX) == 2


def test_operations_as_early_as_can_be():
    """Products that a program spreads out are all there at once where many cores want work."""

    def spread(x):
        total = jnp.zeros(())
        for k in range(4):
            total = total + jnp.sum((x * k) @ x)
        return total

    program_order = peak(spread, MATRIX)
    early = peak(spread, MATRIX, order=as_soon_as_possible)
    assert program_order == pytest.approx(2, abs=0.01)
    assert early > 4


def test_traffic_of_collectives_in_loops():
    mesh = jax.sharding.AbstractMesh((4, 2), ("a", "b"))
    spec = jax.P(("a", "b"))

    def local(x):
        def round(total, _):
            whole = lax.all_gather(x, "a", axis=0, tiled=True)  # 3 of 4 parts come from others
            part = lax.psum_scatter(whole @ whole.T, "b", tiled=True)
            return total + part.sum() + lax.psum(x.sum(), "a"), None

        return lax.scan(round, jnp.zeros(()), None, length=5)[0][None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    program = trace(mapped, jax.ShapeDtypeStruct((8 * 6, 10), jnp.float32))
    gathered, scattered, summed = 3 * 6 * 10 * 4, 24 // 2 * 24 * 4, 2 * 3 / 4 * 4
    assert sent_bytes(program, dict(mesh.shape)) == 5 * (gathered + scattered + summed)


def test_bytes_to_and_from_memory():
    program = trace(lambda x: jnp.exp(x @ x) @ x, MATRIX)
    # Two products, each of which reads two matrices and writes one.
    assert moved_bytes(program) == 6 * BYTES
