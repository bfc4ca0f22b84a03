"""Ranks, condition numbers and noise of spectra that are known."""

import numpy as np
import pytest

from jhessians.linalg.spectra import (
    condition_number,
    contradicted,
    describe,
    effective_rank,
    median,
    noise_floor,
    stable_rank,
)

EPSILON = float(np.finfo(np.float32).eps)


def gram(terms: int, scales: np.ndarray, seed: int = 0) -> np.ndarray:
    """Eigenvalues of a float32 sum of outer products of normal vectors, in rotated axes."""
    random = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(random.standard_normal((len(scales), len(scales))))
    rows = (random.standard_normal((terms, len(scales))) * scales) @ axes.T
    rows = rows.astype(np.float32)
    total = np.zeros((len(scales), len(scales)), np.float32)
    for start in range(0, terms, 16):
        total += rows[start : start + 16].T @ rows[start : start + 16]
    return np.linalg.eigvalsh(total.astype(np.float64))


def test_equal_directions_count_one_each():
    values = np.array([0.0, 3.0, 3.0, 3.0, 0.0])
    assert stable_rank(values) == pytest.approx(3)
    assert effective_rank(values) == pytest.approx(3)


def test_a_large_direction_hides_others_from_the_stable_rank_more_than_from_the_entropy():
    values = np.array([100.0] + [1.0] * 100)
    assert stable_rank(values) == pytest.approx(2)
    # p = ½ and a hundred of 1/200: the entropy is log(2)/2 + log(200)/2.
    assert effective_rank(values) == pytest.approx(np.exp((np.log(2) + np.log(200)) / 2))


def test_the_effective_rank_of_a_geometric_spectrum():
    # Entropy of a geometric distribution of ratio r: (-r log r - (1-r) log(1-r)) / (1-r).
    ratio = 0.9
    expected = np.exp(-(ratio * np.log(ratio) + (1 - ratio) * np.log(1 - ratio)) / (1 - ratio))
    assert effective_rank(ratio ** np.arange(400.0)) == pytest.approx(expected, rel=1e-10)


def test_condition_numbers():
    values = np.array([4.0, 1.0, 0.5])
    assert condition_number(values) == 8
    assert condition_number(values, damping=0.5) == 4.5
    assert condition_number(np.array([1.0, 0.0])) == np.inf
    assert condition_number(np.array([1.0, -1e-9])) == np.inf
    assert condition_number(np.array([1.0, -1e-9]), damping=0.1) == pytest.approx(11)


@pytest.mark.parametrize(("dimension", "terms"), [(96, 24), (96, 80), (64, 640)])
@pytest.mark.parametrize("decay", [0, 2])
def test_missing_terms_leave_as_many_eigenvalues_at_the_floor(dimension, terms, decay):
    values = gram(terms, np.logspace(0, -decay, dimension))
    expected = max(0, dimension - terms) / dimension
    assert describe(values, precision=EPSILON).at_floor == pytest.approx(expected)


def test_a_negative_eigenvalue_shows_how_far_rounding_goes():
    values = np.array([-1e-3, 5e-4, 1.0, 2.0])
    assert noise_floor(values, precision=EPSILON) == 1e-3
    assert describe(values, precision=EPSILON).at_floor == 0.5
    assert noise_floor(values[2:], precision=0.25) == 0.5


def test_a_spectrum_of_zeros_is_dead():
    found = describe(np.zeros(4), precision=EPSILON)
    assert found.dead
    assert found == (4, 0.0, 0.0, 0.0, np.inf, 1.0)
    assert not describe(np.ones(4), precision=EPSILON).dead


@pytest.mark.parametrize(("terms", "low", "high"), [(40, 0.7, 0.95), (8000, 0, 0)])
def test_other_data_contradict_eigenvalues_of_few_terms(terms, low, high):
    """d = 80: half are zero with 40 terms, the others 0.2 to 6; with 8000 all are about 1."""
    random = np.random.default_rng(1)
    mine, others = (random.standard_normal((terms, 80)) for _ in range(2))
    values, vectors = np.linalg.eigh(mine.T @ mine / terms)
    held_out = ((others @ vectors) ** 2).mean(0)
    assert low <= contradicted(values, held_out) <= high


def test_the_median_leaves_out_what_is_not_finite():
    assert median([1.0, np.inf, 3.0, np.nan, 2.0]) == 2.0
    assert np.isnan(median([np.inf]))
