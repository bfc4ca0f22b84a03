"""Scores that know nothing of the model: BM25 of the texts, and random ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def bm25(documents: Sequence[str], queries: Sequence[str]) -> Float32[np.ndarray, "document query"]:
    """BM25 of each document for each query's words, lower case, with k1 = 1.5 and b = 0.75.

    Args:
        documents: Their texts.
        queries: Their texts.

    Returns:
        Scores; 0 where they share no word.

    References:
        Robertson & Zaragoza 2009, The Probabilistic Relevance Framework: BM25 and Beyond. Lù 2024,
        arXiv:2407.03618 (bm25s, which computes them).
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it says that it builds an index

    def words(texts: Sequence[str]) -> list[list[str]]:
        found: list[list[str]] = bm25s.tokenize(
            list(texts), stopwords=None, return_ids=False, show_progress=False
        )
        return found

    index = bm25s.BM25()
    index.index(words(documents), show_progress=False)
    known = set(index.vocab_dict)
    scores = np.zeros((len(documents), len(queries)), np.float32)
    for query, its_words in enumerate(words(queries)):
        if seen := [word for word in its_words if word in known]:
            scores[:, query] = index.get_scores(seen)
    return scores


def random_scores(documents: int, queries: int, seed: int) -> np.ndarray:
    """Standard normal scores, [document, query]."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((documents, queries)).astype(np.float32)
