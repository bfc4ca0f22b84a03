"""BM25 against its formula."""

import math

import numpy as np

from jhessians.evaluation.baselines import bm25, random_scores

DOCUMENTS = ["The cat sat on the mat.", "A dog; the DOG ran!", "zebra cat cat", "nothing here"]
QUERIES = ["cat", "the dog", "unknown words"]


def formula(k1=1.5, b=0.75):
    words = [
        ["the", "cat", "sat", "on", "the", "mat"], ["dog", "the", "dog", "ran"],
        ["zebra", "cat", "cat"], ["nothing", "here"],
    ]  # fmt: skip
    mean = sum(map(len, words)) / len(words)
    scores = np.zeros((4, 3))
    for q, query in enumerate([["cat"], ["the", "dog"], ["unknown", "words"]]):
        for d, document in enumerate(words):
            for word in query:
                held = sum(word in each for each in words)
                idf = math.log(1 + (len(words) - held + 0.5) / (held + 0.5))
                count = document.count(word)
                length = 1 - b + b * len(document) / mean
                scores[d, q] += idf * count / (count + k1 * length)
    return scores


def test_bm25_is_the_formula():
    found = bm25(DOCUMENTS, QUERIES)
    np.testing.assert_allclose(found, formula(), rtol=1e-5)
    assert (found[:, 2] == 0).all() and found[:, :2].any()


def test_random_scores_are_the_seeds():
    first, second = random_scores(50, 3, 0), random_scores(50, 3, 1)
    np.testing.assert_array_equal(first, random_scores(50, 3, 0))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.3
