"""Eigendecompositions against numpy, and the threads that run them side by side."""

import threading
import time
from itertools import product

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from jhessians.errors import NumericsError
from jhessians.linalg.eigen import eigendecompose, ordered_map, share_by_cost
from tests.oracles import kfac_numpy
from tests.small import relative_error

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def covariance(d, count, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, d)) * np.logspace(0, -4, d)
    return x.T @ x


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize(("d", "count"), [(1, 9), (2, 9), (40, 100), (40, 7)])
def test_equals_numpy(d, count, dtype):
    matrix = covariance(d, count).astype(dtype)
    values, vectors = eigendecompose("it", matrix.copy(), count, dtype)
    expected, _ = kfac_numpy.eigendecomposition(matrix, count)
    tolerance = 1e-6 if dtype == FLOAT32 else 1e-13
    assert values.dtype == vectors.dtype == dtype
    assert (np.diff(values) >= 0).all()
    assert relative_error(values, expected) < tolerance
    assert relative_error(vectors.T @ vectors, np.eye(d)) < 10 * tolerance
    assert relative_error((vectors * values) @ vectors.T, matrix / count) < 10 * tolerance
    assert vectors.flags.c_contiguous


def test_single_precision_input_is_computed_in_double():
    # A spectrum over ten decades: in float32 the small half would be noise of either sign.
    d = 60
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0]
    matrix = (basis * np.logspace(-10, 0, d)) @ basis.T
    values, _ = eigendecompose("it", matrix.copy(), 1, FLOAT64)
    np.testing.assert_allclose(values, np.logspace(-10, 0, d), rtol=1e-4)


def test_an_asymmetric_sum_is_averaged_with_its_transpose():
    matrix = covariance(6, 50) + np.triu(np.random.default_rng(1).standard_normal((6, 6)))
    values, _ = eigendecompose("it", matrix.copy(), 50, FLOAT64)
    expected, _ = kfac_numpy.eigendecomposition(matrix, 50)
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_named(bad):
    matrix = covariance(6, 50)
    matrix[2, 3] = bad
    with pytest.raises(NumericsError, match="^the gradient covariance of h.0 holds NaN or inf"):
        eigendecompose("the gradient covariance of h.0", matrix, 50, FLOAT32)


def test_failure_to_converge_is_named(monkeypatch):
    def fail(*args, **options):
        raise np.linalg.LinAlgError("did not settle")

    monkeypatch.setattr(np.linalg, "eigh", fail)
    with pytest.raises(NumericsError, match="of layer 3 did not converge: did not settle"):
        eigendecompose("layer 3", covariance(3, 9), 9, FLOAT32)


def test_map_keeps_the_order():
    def slow_first(i):
        time.sleep(0.02 * (i % 3 == 0))
        return i * i

    result = ordered_map(slow_first, range(20), workers=4, window=6)
    assert list(result) == [i * i for i in range(20)]
    assert list(ordered_map(slow_first, [], workers=2, window=2)) == []
    assert list(ordered_map(slow_first, [3], workers=2, window=5)) == [9]


@pytest.mark.parametrize("window", [1, 2, 5])
def test_map_draws_at_most_a_window_ahead_and_on_the_callers_thread(window):
    drawn, threads = 0, set()

    def items():
        nonlocal drawn
        for i in range(12):
            threads.add(threading.get_ident())
            drawn += 1
            yield i

    furthest = 0
    for taken, _ in enumerate(ordered_map(lambda i: i, items(), workers=3, window=window)):
        furthest = max(furthest, drawn - taken)
    assert furthest == window
    assert threads == {threading.get_ident()}


def test_map_runs_side_by_side_with_one_blas_thread_each():
    both = threading.Barrier(2, timeout=20)
    pools = []

    def meet(_):
        both.wait()
        pools.append([p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"])

    list(ordered_map(meet, range(2), workers=2, window=2))
    assert len(pools) == 2 and all(pool and set(pool) == {1} for pool in pools)


def test_map_raises_what_the_function_raised_and_starts_no_more():
    started = []

    def fail(i):
        started.append(i)
        if i == 1:
            raise NumericsError("item 1")
        time.sleep(0.01)
        return i

    results = ordered_map(fail, range(100), workers=1, window=4)
    assert next(results) == 0
    with pytest.raises(NumericsError, match="item 1"):
        next(results)
    assert max(started) < 10


def test_map_can_be_left_early():
    for value in ordered_map(lambda i: i, range(100), workers=2, window=3):
        if value == 2:
            break
    assert threading.active_count() < 20


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_costs_are_shared_nearly_as_well_as_can_be(hosts):
    dimensions = [64, 512, 100, 300, 310, 64, 480, 200]
    owners = share_by_cost(dimensions, hosts)
    assert len(owners) == len(dimensions) and set(owners) == set(range(hosts))

    def longest(assignment):
        loads = np.zeros(hosts)
        np.add.at(loads, list(assignment), np.array(dimensions, float) ** 3)
        return loads.max()

    best = min(longest(each) for each in product(range(hosts), repeat=len(dimensions)))
    assert longest(owners) <= best * (4 / 3)  # Graham's bound for longest-first
    assert owners == share_by_cost(dimensions, hosts)
