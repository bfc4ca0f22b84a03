"""How far the scores of two tools agree, query by query."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Agreement:
    """Of the query on which two tools agree least.

    Attributes:
        difference: Largest absolute difference over the query's largest absolute score.
        ranks: Spearman correlation over the documents (or tokens).
    """

    difference: float
    ranks: float


def agreement(ours: Path, theirs: Path) -> Agreement:
    """Compare two tools' scores, each a score store or a file of kronfluence's.

    Raises:
        ValueError: If they are scores of different rows or queries.
    """
    return compare(read(ours), read(theirs))


def read(place: Path):
    """[query, row] in float64."""
    import numpy as np

    if place.is_dir():
        from jhessians.interop.score_store import ScoreStore

        return ScoreStore(place).read_all().T.astype(np.float64)
    from safetensors.numpy import load_file

    scores = load_file(place)["all_modules"].astype(np.float64)
    if scores.ndim == 3:
        # A document's last token predicts nothing: the others leave it out.
        scores = scores[:, :, :-1].reshape(len(scores), -1)
    return np.atleast_2d(scores)


def compare(first, second) -> Agreement:
    """The worst of all queries; both [query, row]."""
    import numpy as np

    if first.shape != second.shape:
        raise ValueError(f"scores [query, row] of {first.shape} and of {second.shape}")
    largest = np.abs(second).max(axis=1)
    difference = np.abs(first - second).max(axis=1) / largest
    ranks = [np.corrcoef(_ranks(x), _ranks(y))[0, 1] for x, y in zip(first, second, strict=True)]
    return Agreement(float(difference.max()), float(min(ranks)))


def _ranks(scores):
    import numpy as np

    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(len(scores))
    return ranks
