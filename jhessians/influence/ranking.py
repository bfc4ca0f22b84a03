"""The documents at the top and at the bottom of each query's ranking, found as scores come in."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Ranked(NamedTuple):
    """One place in a query's ranking.

    Attributes:
        query: The column of scores.
        rank: 1 for the highest score, 2 for the next; -1 for the lowest, -2 for the one before.
        score: How much the document helps.
        document: Its number in the data.
    """

    query: int
    rank: int
    score: float
    document: int


class Ranking:
    """Keeps the best and the worst documents of each query; order and batches don't matter.

    Of equal scores the one of the document with the smaller number counts as higher.

    Args:
        queries: How many columns of scores there are.
        count: How many documents are kept at either end.
    """

    def __init__(self, queries: int, count: int):
        self.count = count
        self._best = _Kept.empty(queries)
        self._worst = _Kept.empty(queries)

    @property
    def state(self) -> tuple[np.ndarray, ...]:
        """All that is kept, from which `take_up` goes on."""
        return (*self._best, *self._worst)

    def take_up(self, state: tuple[np.ndarray, ...]) -> None:
        """Go on from what another ranking of as many queries kept, its `state`."""
        self._best, self._worst = _Kept(*state[:2]), _Kept(*state[2:])

    def add(
        self,
        documents: Int[np.ndarray, " row"],
        scores: Float[np.ndarray, "row query"],
        first_query: int = 0,
    ) -> None:
        """Take some documents' scores into account.

        Args:
            documents: Their numbers, each of which may come once for a query.
            scores: For consecutive queries.
            first_query: The number of the first.
        """
        columns = slice(first_query, first_query + scores.shape[1])
        self._best = self._best.merged(documents, scores.T, columns, self.count)
        self._worst = self._worst.merged(documents, -scores.T, columns, self.count, last=True)

    def best(self, query: int) -> list[Ranked]:
        """The documents with the highest scores, the highest first."""
        scores, documents = self._best.of(query)
        return [
            Ranked(query, rank, float(score), int(document))
            for rank, (score, document) in enumerate(zip(scores, documents, strict=True), start=1)
        ]

    def worst(self, query: int) -> list[Ranked]:
        """The documents with the lowest scores, the lowest first."""
        scores, documents = self._worst.of(query)
        return [
            Ranked(query, -rank, -float(score), int(document))
            for rank, (score, document) in enumerate(zip(scores, documents, strict=True), start=1)
        ]

    def all(self) -> Iterator[Ranked]:
        """Of each query in turn its best, then its worst documents."""
        for query in range(len(self._best.scores)):
            yield from self.best(query)
            yield from self.worst(query)


class _Kept(NamedTuple):
    """The highest scores of each query so far, descending, and whose they are; -inf for none."""

    scores: Float[np.ndarray, "query kept"]
    documents: Int[np.ndarray, "query kept"]

    @classmethod
    def empty(cls, queries: int) -> "_Kept":
        return cls(np.empty((queries, 0), np.float64), np.empty((queries, 0), np.int64))

    def merged(
        self,
        documents: Int[np.ndarray, " row"],
        scores: Float[np.ndarray, "query row"],
        columns: slice,
        count: int,
        *,
        last: bool = False,
    ) -> "_Kept":
        """With more documents in some columns, of which `count` are kept."""
        # Of equal scores the smallest number's comes first; with `last` the largest number's does.
        shape = (len(self.scores), max(self.scores.shape[1], min(count, self._width(scores))))
        before = _Kept(np.full(shape, -np.inf), np.full(shape, -1, np.int64))
        before.scores[:, : self.scores.shape[1]] = self.scores
        before.documents[:, : self.scores.shape[1]] = self.documents
        both = np.concatenate([before.scores[columns], scores.astype(np.float64)], 1)
        numbers = np.broadcast_to(documents, scores.shape)
        whose = np.concatenate([before.documents[columns], numbers], 1)
        order = np.lexsort((-whose if last else whose, -both), axis=1)[:, : shape[1]]
        before.scores[columns] = np.take_along_axis(both, order, 1)
        before.documents[columns] = np.take_along_axis(whose, order, 1)
        return before

    def _width(self, scores: Float[np.ndarray, "query row"]) -> int:
        return self.scores.shape[1] + scores.shape[1]

    def of(self, query: int) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """One query's, without places that nothing fills."""
        real = self.documents[query] >= 0
        return self.scores[query][real], self.documents[query][real]
