"""Packed Grams: the right numbers, in fewer of them, exactly symmetric again when unpacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jhessians.linalg.symmetric import (
    block_bounds,
    packed_gram,
    packed_product,
    packed_shapes,
    packed_trace,
    unpack,
)
from tests.small import relative_error

DIMENSIONS = [1, 3, 120, 511, 512, 513, 701]


def rows(d, count=64, seed=0):
    return np.random.default_rng(seed).standard_normal((count, d)).astype(np.float32)


@pytest.mark.parametrize("multiple", [1, 7, 8])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_gram(d, multiple):
    x = rows(d)
    blocks = packed_gram(jnp.asarray(x), multiple=multiple)
    for block, (height, width), (start, stop) in zip(
        blocks, packed_shapes(d), block_bounds(d), strict=True
    ):
        assert (height, width) == (stop - start, d - start)
        assert block.shape == (-(-height // multiple) * multiple, width)
        assert not np.asarray(block)[height:].any()
    exact = x.astype(np.float64)
    assert relative_error(unpack(blocks, d), exact.T @ exact) < 1e-6


@pytest.mark.parametrize("d", DIMENSIONS)
def test_blocks_cover_every_row_once(d):
    bounds = block_bounds(d)
    assert [0, *(stop for _, stop in bounds)] == [*(start for start, _ in bounds), d]
    assert all(stop > start for start, stop in bounds)
    if d >= 512:
        stored = sum(height * width for height, width in packed_shapes(d))
        assert stored == pytest.approx(2 / 3 * d * d, rel=0.01)


@pytest.mark.parametrize("d", [5, 520])
def test_unpacked_is_exactly_symmetric_whatever_lies_below_the_diagonal(d):
    x = rows(d)
    blocks = [np.array(block) for block in packed_gram(jnp.asarray(x), multiple=8)]
    expected = unpack(blocks, d)
    random = np.random.default_rng(1)
    for block, (height, _) in zip(blocks, packed_shapes(d), strict=True):
        square = block[:height, :height]
        square += np.tril(random.standard_normal(square.shape), -1).astype(np.float32)
        block[height:] = np.nan
    result = unpack(blocks, d)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(result, result.T)
    assert result.dtype == np.float32


@pytest.mark.parametrize("d", [6, 514])
def test_product_and_trace(d):
    x, weights = rows(d), np.random.default_rng(1).random(64).astype(np.float32)
    y = x * weights[:, None]  # xᵀ diag(w) x is symmetric
    blocks = packed_product(jnp.asarray(x), jnp.asarray(y), multiple=8)
    exact = x.astype(np.float64).T @ y.astype(np.float64)
    assert relative_error(unpack(blocks, d), exact) < 1e-6
    assert relative_error(packed_trace(blocks, d), np.trace(exact)) < 1e-6
    stacked = [jnp.stack([block, 2 * block]) for block in blocks]
    assert relative_error(packed_trace(stacked, d), np.trace(exact) * np.array([1, 2])) < 1e-6


def test_accumulates_in_the_type_asked_for():
    x = jnp.asarray(rows(6, count=4096), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    (block,) = packed_gram(x, dtype=jnp.float32)
    assert block.dtype == jnp.float32
    assert relative_error(block, exact.T @ exact) < 1e-5
    with jax.enable_x64(True):
        (block,) = packed_gram(x.astype(jnp.float32), dtype=jnp.float64)
        assert block.dtype == np.float64
        assert relative_error(block, exact.T @ exact) < 1e-14
