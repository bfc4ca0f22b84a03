"""What `score` writes: the store of scores, as they come, and the lists of the documents on top."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jhessians.data.documents import Documents
from jhessians.data.selecting import Column
from jhessians.files import parse_json, read_text
from jhessians.influence.equations import Refined
from jhessians.influence.ranking import Ranking
from jhessians.interop.rundir import output_error
from jhessians.interop.score_store import ScoreWriter, create_array

LISTED = 20
"""Documents at either end of each query's list, unless `--top` says another number."""

TOP_FILE = "top.jsonl"
MODULE_SCORES = "module_scores.npy"
MODULES = "modules.json"
SELF_INFLUENCE = "self_influence.npy"
COLUMNS = "columns.jsonl"
REFINEMENT = "refinement.jsonl"


class Results:
    """Takes scores batch by batch and writes them into a folder.

    In a run of several processes the first one makes it. Results that a run left there are
    continued, the ranking excepted.

    Args:
        folder: Where to write; exists.
        documents: The training data.
        columns: What each column of scores is about.
        tokens: Whether scores are of tokens.
        parts: Names of the modules or layers whose shares are kept apart; None if none are.
        top: How many documents are kept at either end of each query; None for all.
        candidates: The numbers of the documents that are scored; None for all.

    Raises:
        OutputError: If the disk can't hold the scores.
    """

    def __init__(
        self,
        folder: Path,
        documents: Documents,
        columns: Sequence[Column],
        *,
        tokens: bool,
        parts: Sequence[str] | None,
        top: int | None,
        candidates: np.ndarray | None,
    ):
        self.folder, self.documents, self.columns = folder, documents, columns
        self.ranking = Ranking(len(columns), top or LISTED)
        self._numbers = np.arange(len(documents)) if candidates is None else candidates
        self._only_top, self._candidates = top is not None, candidates
        self._offsets: np.ndarray | None = None
        if tokens:
            counts = np.maximum(documents.lengths[self._numbers] - 1, 0)
            self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self._writer = None if self._only_top else self._store(self._numbers)
        self._own: np.ndarray | None = None
        self._parts = None
        if parts is not None:
            self._parts = self._array(MODULE_SCORES, (len(documents), len(columns), len(parts)))
            (folder / MODULES).write_text(json.dumps(list(parts)), encoding="utf-8")

    def add(self, documents: np.ndarray, scores: np.ndarray, first_query: int) -> None:
        """Some documents' scores for consecutive queries.

        Args:
            documents: Their places among those that are scored, [row]; -1 for none.
            scores: [row, query], [row, position, query] of tokens, or [row, part, query].
            first_query: The number of the first.
        """
        real = documents >= 0
        places, scores = documents[real], scores[real]
        last = min(first_query + scores.shape[-1], len(self.columns))
        scores = scores[..., : last - first_query]
        if self._offsets is not None:
            self._add_tokens(places, scores, first_query)
            scores = scores.sum(1)
        elif self._parts is not None:
            self._parts[places, first_query:last] = scores.swapaxes(1, 2)
            scores = scores.sum(1)
        if self._writer is not None and self._offsets is None:
            self._writer.write(places, scores, first_query)
        self.ranking.add(self._numbers[places], scores, first_query)

    def add_self_influence(self, documents: np.ndarray, own: np.ndarray) -> None:
        """Some documents' self-influences; places as in `add`."""
        if self._own is None:
            self._own = self._array(SELF_INFLUENCE, (len(self._numbers),))
        real = documents >= 0
        self._own[documents[real]] = own[real]

    def add_refinement(self, found: Refined, first: int, count: int) -> None:
        """How well consecutive columns' equations are solved.

        Args:
            found: Of the columns, and perhaps of fillers behind them.
            first: The first column's number; what is known of later ones is forgotten.
            count: How many columns.
        """
        lines = self.refinement()[:first]
        for query in range(count):
            kept = found.kept[query]
            lines.append({
                "column": first + query, "residual": _number(found.residuals[kept, query]),
                "step": int(found.steps[kept]), "steps": found.steps.tolist(),
                "residuals": [_number(x) for x in found.residuals[:, query]],
                "objectives": [_number(x) for x in found.objectives[:, query]],
            })  # fmt: skip
        _write_lines(self.folder / REFINEMENT, lines)

    def refinement(self) -> list[dict[str, Any]]:
        """What is known of how well columns' equations are solved, a line each."""
        path = self.folder / REFINEMENT
        return [parse_json(line) for line in read_text(path).splitlines()] if path.exists() else []

    def flush(self) -> None:
        """Have all that was added put onto the disk."""
        if self._writer is not None:
            self._writer.flush()
        for array in (self._own, self._parts):
            if isinstance(array, np.memmap):
                array.flush()

    def finish(self, scored: np.ndarray, text_of: Callable[[int], str]) -> None:
        """Give documents without a gradient their zeros, and write the lists.

        Args:
            scored: The places of the documents that were in a batch.
            text_of: A document's text, by its number in the data.
        """
        left = np.setdiff1d(np.arange(len(self._numbers)), scored)
        if len(left):
            shape = (len(left), len(self.columns))
            if self._offsets is None:
                self.add(left, np.zeros((len(left), 1, shape[1]))[:, 0]
                         if self._parts is None else self._zero_parts(left), 0)  # fmt: skip
            else:
                self.ranking.add(self._numbers[left], np.zeros(shape))
        if self._only_top:
            self._write_top()
        self.flush()
        self._write_lists(text_of)

    def _zero_parts(self, left: np.ndarray) -> np.ndarray:
        assert self._parts is not None
        return np.zeros((len(left), self._parts.shape[2], len(self.columns)))

    def _store(self, numbers: np.ndarray) -> ScoreWriter:
        return ScoreWriter(
            self.folder,
            documents=len(numbers),
            queries=len(self.columns),
            offsets=self._offsets,
            candidates=numbers if self._candidates is not None or self._only_top else None,
        )

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            return create_array(self.folder / name, shape)
        except OSError as error:
            raise output_error(error, self.folder) from error

    def _add_tokens(self, places: np.ndarray, scores: np.ndarray, first_query: int) -> None:
        assert self._offsets is not None and self._writer is not None
        for place, of_tokens in zip(places, scores, strict=True):
            start, stop = self._offsets[place : place + 2]
            rows = np.arange(start, stop)
            self._writer.write(rows, of_tokens[: len(rows)], first_query)

    def _write_top(self) -> None:
        """The store of those documents alone that are at either end of some query's ranking."""
        places = list(self.ranking.all())
        kept = np.unique([each.document for each in places])
        scores = np.zeros((len(kept), len(self.columns)))
        written = np.zeros(scores.shape, bool)
        rows = np.searchsorted(kept, [each.document for each in places])
        queries = [each.query for each in places]
        scores[rows, queries] = [each.score for each in places]
        written[rows, queries] = True
        self._writer = self._store(kept)
        self._writer.write(np.arange(len(kept)), scores, written=written)

    def _write_lists(self, text_of: Callable[[int], str]) -> None:
        texts: dict[int, str] = {}

        def line(each: Any) -> dict[str, Any]:
            if each.document not in texts:
                texts[each.document] = text_of(each.document)
            return {**each._asdict(), "text": texts[each.document]}

        _write_lines(self.folder / TOP_FILE, (line(each) for each in self.ranking.all()))


def write_columns(folder: Path, columns: Sequence[Column], texts: Sequence[str]) -> None:
    """A line for each column of scores: of which query, at which position, and its text."""
    lines = (
        {"column": number, "query": column.document, "position": column.position, "text": text}
        for number, (column, text) in enumerate(zip(columns, texts, strict=True))
    )
    _write_lines(folder / COLUMNS, lines)


def _number(value: Any) -> float | None:
    """A number as JSON knows it, which has no infinity."""
    return float(value) if np.isfinite(value) else None


def _write_lines(path: Path, lines: Any) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise output_error(error, path) from error
