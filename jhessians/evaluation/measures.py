"""How good scores are, query by query, and how sure a mean over queries is.

scores: [document, query], higher for what helps more. Each measure gives a value per query; their
mean is what is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy.stats import rankdata

DRAWS = 10_000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean, and where it may lie.

    Attributes:
        mean: Over the queries.
        low: The lower end.
        high: The upper end.
    """

    mean: float
    low: float
    high: float

    def render(self) -> str:
        """As a table has it."""
        return f"{self.mean:6.3f}  [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(
    values: Float[np.ndarray, " query"], *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean with a percentile bootstrap interval over the queries.

    Args:
        values: One for each query.
        level: How often the interval should hold the mean over all such queries.
        seed: Of the bootstrap's draws.

    Returns:
        The interval.

    References:
        Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(values), (DRAWS, len(values)), dtype=np.int32)
    means = np.asarray(values, np.float64)[drawn].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(values)), float(low), float(high))


def linear_datamodeling_scores(
    scores: Num[np.ndarray, "document query"],
    subsets: Bool[np.ndarray, "model document"],
    losses: Num[np.ndarray, "model query"],
) -> Float[np.ndarray, " query"]:
    """The linear datamodeling score (LDS) of each query.

    It is Spearman's correlation, over the models, between the sum of the scores of the documents
    that a model was trained on and the negative of the model's loss.

    Args:
        scores: Of all documents that the models were trained on.
        subsets: What each model was trained on.
        losses: What each model loses on each query.

    Returns:
        Between -1 and 1; 0 where all sums, or all losses, are the same.

    References:
        Park et al. 2023, arXiv:2303.14186, definition 2.3.
    """
    predicted = subsets.astype(np.float64) @ scores.astype(np.float64)
    ranks = [rankdata(each, axis=0) for each in (predicted, -losses.astype(np.float64))]
    first, second = (each - each.mean(0) for each in ranks)
    lengths = np.sqrt((first**2).sum(0) * (second**2).sum(0))
    return (first * second).sum(0) / np.where(lengths == 0, 1, lengths)


def retrieval(
    scores: Num[np.ndarray, "document query"],
    relevant: Sequence[Sequence[int]],
    at: Sequence[int] = (),
) -> dict[str, Float[np.ndarray, " query"]]:
    """How well scores find the documents that are known to be relevant.

    Args:
        scores: Of equal ones the document that comes first in the data set ranks first.
        relevant: The numbers of each query's relevant documents, at least one.
        at: For which k to give recall@k.

    Returns:
        `R-precision`, the share of relevant documents among the first R, of which there are R;
        `MRR`, one over the rank of the first relevant one; `top-1`, whether that is the first of
        all; `recall@k`, the share of the relevant documents that is among the first k.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    found: dict[str, list[float]] = {}
    for query, documents in enumerate(relevant):
        hits = np.isin(order[:, query], list(documents))
        first = int(np.argmax(hits))
        values = {
            "R-precision": hits[: len(documents)].mean(),
            "MRR": 1 / (first + 1),
            "top-1": float(first == 0),
            **{f"recall@{k}": hits[:k].sum() / len(documents) for k in at},
        }
        for name, value in values.items():
            found.setdefault(name, []).append(float(value))
    return {name: np.array(values) for name, values in found.items()}
