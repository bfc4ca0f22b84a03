"""Measures against scipy, brute force and cases with a known answer."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from jhessians.evaluation.measures import (
    linear_datamodeling_scores,
    mean_interval,
    retrieval,
)


def test_lds_is_spearmans_correlation_of_sums_and_losses():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((30, 5)).round(1)
    subsets = rng.random((12, 30)) < 0.5
    losses = rng.standard_normal((12, 5)).round(1)  # with ties
    found = linear_datamodeling_scores(scores, subsets, losses)
    for query in range(5):
        sums = [sum(scores[n, query] for n in np.flatnonzero(subset)) for subset in subsets]
        expected = spearmanr(sums, -losses[:, query]).statistic
        np.testing.assert_allclose(found[query], expected, atol=1e-12)


def test_lds_is_one_for_the_truth_and_minus_one_for_its_opposite():
    rng = np.random.default_rng(1)
    truth = rng.standard_normal((40, 3))
    subsets = rng.random((20, 40)) < 0.5
    losses = 7 - subsets @ truth
    np.testing.assert_allclose(linear_datamodeling_scores(truth, subsets, losses), 1)
    np.testing.assert_allclose(linear_datamodeling_scores(-truth, subsets, losses), -1)


def test_lds_of_scores_that_say_nothing_is_zero():
    subsets = np.eye(4, dtype=bool)
    losses = np.arange(8.0).reshape(4, 2)
    assert (linear_datamodeling_scores(np.ones((4, 2)), subsets, losses) == 0).all()


def test_the_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(2)
    samples = rng.exponential(2.0, (200, 80))
    held = [low <= 2.0 <= high for _, low, high in map(mean_interval, samples)]
    assert 0.89 < np.mean(held) < 0.98
    mean, low, high = mean_interval(samples[0])
    assert mean == pytest.approx(samples[0].mean())
    width = 2 * 1.96 * samples[0].std() / 80**0.5
    assert high - low == pytest.approx(width, rel=0.1)


def test_retrieval_by_hand():
    scores = np.array([[3.0, 0.0], [2.0, 0.0], [1.0, 5.0], [0.0, 0.0], [9.0, 1.0]])
    # The first query ranks 4 0 1 2 3; the second 2 4, then 0 1 3, whose scores are equal.
    found = retrieval(scores, [[1, 4], [1]], at=[1, 3, 5])
    expected = {
        "R-precision": [0.5, 0.0],
        "MRR": [1.0, 0.25],
        "top-1": [1.0, 0.0],
        "recall@1": [0.5, 0.0],
        "recall@3": [1.0, 0.0],
        "recall@5": [1.0, 1.0],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, err_msg=name)
