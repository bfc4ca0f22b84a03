"""Errors that two halves predict, against the errors that they have to a known truth."""

import numpy as np
import pytest

from jhessians.linalg.agreement import Eigen, Products, cosine, of_arrays, of_eigen, times_more

DIMENSION = 48
TRUTH = np.diag(np.logspace(0, -1.5, DIMENSION))


def wishart(random, terms):
    """A mean of outer products whose expectation is `TRUTH`."""
    rows = random.standard_normal((terms, DIMENSION)) * np.sqrt(np.diag(TRUTH))
    return rows.T @ rows / terms


def relative(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("terms", [30, 200, 2000])
def test_halves_predict_the_error_of_a_covariance(terms):
    """Exact on average, with terms fewer than dimensions, too."""
    predicted, true, extrapolated, more = [], [], [], []
    for seed in range(40):
        random = np.random.default_rng(seed)
        first, second = wishart(random, terms // 2), wishart(random, terms // 2)
        products = of_arrays(first, second)
        predicted.append(products.error(0.5) ** 2)
        true.append(relative((first + second) / 2, TRUTH) ** 2)
        extrapolated.append(products.error(0.5 / 4) ** 2)
        more.append(relative(wishart(random, 4 * terms), TRUTH) ** 2)
    # Real normal vectors: E |Ĉ - C|² = ((tr C)² + tr C²) / n.
    squares = np.square(TRUTH).sum()
    expected = (np.trace(TRUTH) ** 2 + squares) / terms / squares
    assert np.mean(true) == pytest.approx(expected, rel=0.1)
    assert np.mean(predicted) == pytest.approx(expected, rel=0.1)
    assert np.mean(extrapolated) == pytest.approx(expected / 4, rel=0.1)
    assert np.mean(more) == pytest.approx(expected / 4, rel=0.1)


def inverse(covariance, vector, damping=1e-3):
    return np.linalg.solve(covariance + damping * np.eye(DIMENSION), vector)


@pytest.mark.parametrize(("terms", "holds"), [(20_000, True), (96, False)])
def test_halves_predict_the_error_of_an_inverse_where_terms_are_many(terms, holds):
    """With terms about as many as dimensions both halves are wrong alike, and this is seen."""
    predicted, shared, true, cosines = [], [], [], []
    truth = inverse(TRUTH, np.ones(DIMENSION))
    for seed in range(20):
        random = np.random.default_rng(seed)
        first, second = wishart(random, terms // 2), wishart(random, terms // 2)
        vectors = [inverse(c, np.ones(DIMENSION)) for c in (first, second, (first + second) / 2)]
        predicted.append(of_arrays(*vectors[:2]).error(0.5))
        shared.append(relative((vectors[0] + vectors[1]) / 2, vectors[2]))
        true.append(relative(vectors[2], truth))
        lengths = np.linalg.norm(vectors[2]) * np.linalg.norm(truth)
        cosines.append(vectors[2] @ truth / lengths)
    assert (np.mean(predicted) == pytest.approx(np.mean(true), rel=0.15)) == holds
    assert not holds or np.mean(cosines) == pytest.approx(cosine(np.mean(predicted)), abs=2e-3)
    assert (np.mean(shared) < 0.3 * np.mean(predicted)) == holds


def eigen(random, outputs=5, inputs=7):
    q_s, q_a = (np.linalg.qr(random.standard_normal((d, d)))[0] for d in (outputs, inputs))
    return Eigen(random.random((outputs, inputs)), q_s, q_a)


def dense(factors):
    vectors = np.kron(factors.of_gradient, factors.of_activation)
    return (vectors * factors.values.ravel()) @ vectors.T


def test_products_of_matrices_that_are_not_formed():
    random = np.random.default_rng(0)
    first, second = eigen(random), eigen(random)
    assert of_eigen(first, second) == pytest.approx(of_arrays(dense(first), dense(second)))


def test_eigenvectors_in_another_order_are_the_same_matrix():
    first = eigen(np.random.default_rng(0))
    order = np.array([3, 0, 4, 1, 2])
    second = Eigen(first.values[order], -first.of_gradient[:, order], first.of_activation)
    assert of_eigen(first, second).difference() < 1e-6
    assert of_arrays(first.values, second.values).difference() > 0.1  # which eigenvalues alone hide


def test_products_add_up_over_modules():
    random = np.random.default_rng(0)
    first, second = random.standard_normal((2, 6)), random.standard_normal((2, 6)) + 0.1
    parts = [of_arrays(a, b) for a, b in zip(first, second, strict=True)]
    assert parts[0].plus(parts[1]) == pytest.approx(of_arrays(first, second))


def test_halves_that_have_nothing_in_common():
    assert Products(1.0, 1.0, 0.0).difference() == np.inf
    assert Products(1.0, 1.0, -0.5).error(0.5) == np.inf
    assert np.isnan(Products(0.0, 0.0, 0.0).difference())
    assert Products(2.0, 2.0, 2.0).difference() == 0


def test_how_many_terms_are_needed():
    assert times_more(0.2, 0.05) == pytest.approx(16)
    assert times_more(0.01, 0.05) == 1
