"""bergson's score store: a score of every document (or token) for every query, on disk.

    info.json       documents, rows, queries, and how a row lies in scores.bin
    scores.bin      [row, query] of pairs: a score, and whether it was written
    offsets.npy     per token only: document i has the rows offsets[i] to offsets[i + 1]
    candidates.npy  only if some documents were scored: document i is the data set's candidates[i]

bergson declares a row as a struct of 2 · queries fields and goes through it field by field. All its
fields repeat with one stride, so here the file is an array of pairs, written with one copy.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from jhessians.errors import CheckpointError, NumericsError, quoted
from jhessians.interop._score_files import (
    CANDIDATES,
    INFO,
    OFFSETS,
    PAIR,
    REMEDY,
    SCORES,
    check_same,
    check_size,
    checked_extras,
    count_of,
    create_array,
    create_files,
    needed_bytes,
    read_array,
    read_info,
    read_layout,
    store_info,
)
from jhessians.interop.manifest import check_files
from jhessians.interop.rundir import output_error

__all__ = ["ScoreStore", "ScoreWriter", "create_array", "needed_bytes"]


class ScoreWriter:
    """Writes a score store, any cells in any order; a folder that has one is continued.

    In a run of several processes one of them makes and uses it.

    Args:
        folder: Made if missing, its parent as well.
        documents: Documents that the store holds.
        queries: Scores of each row.
        offsets: Per token: where each document's rows begin, and the number of rows at the end.
        candidates: Where each document stands in the data set, if the store doesn't hold all.

    Raises:
        OutputError: If the disk can't hold the scores or isn't ours to write to, or if the folder
            holds other scores than these.
        ValueError: If there are no rows or queries, or `offsets` or `candidates` don't fit.
    """

    def __init__(
        self,
        folder: Path,
        *,
        documents: int,
        queries: int,
        offsets: Int[np.ndarray, " document_and_end"] | None = None,
        candidates: Int[np.ndarray, " document"] | None = None,
    ):
        self.folder = folder
        rows = documents if offsets is None else _last(offsets)
        if rows < 1 or queries < 1:
            raise ValueError(f"a score store of {rows} rows and {queries} queries; expected some")
        extras = checked_extras(documents, rows, offsets, candidates)
        info = store_info(documents, rows, queries, per_token=offsets is not None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / INFO).exists():
                check_same(folder, info, extras)
            else:
                create_files(folder, info, extras)
            pairs = np.memmap(folder / SCORES, dtype=PAIR, mode="r+", shape=(rows, queries))
        except OSError as error:
            raise output_error(error, folder) from error
        self._pairs = pairs
        # Numpy copies structs field by field, but numbers of the same size at once.
        self._cells = pairs.view(np.uint64)

    @property
    def written(self) -> Bool[np.ndarray, "row query"]:
        """Which scores are there, in this run or from an earlier one; a view of the file."""
        view: np.ndarray = self._pairs["written"]
        view.flags.writeable = False
        return view

    def write(
        self,
        rows: Int[np.ndarray, " row"],
        scores: Float[np.ndarray, "row query"],
        first_query: int = 0,
        written: Bool[np.ndarray, "row query"] | None = None,
    ) -> None:
        """Put scores into the store and mark them as written.

        Args:
            rows: The store's rows they are for.
            scores: Stored in float32.
            first_query: Query of the first column.
            written: False where there is no score; such cells stay as they were.

        Raises:
            IndexError: If the store has no such rows or queries.
            NumericsError: If a score is NaN or infinite, or beyond float32.
        """
        count, width = scores.shape
        stored, queries = self._pairs.shape
        last = first_query + width
        if not 0 <= first_query <= last <= queries:
            raise IndexError(f"queries {first_query} to {last}; the store has {queries}")
        if count and not 0 <= rows.min() <= rows.max() < stored:
            raise IndexError(f"rows {rows.min()} to {rows.max()}; the store has {stored}")
        block = np.zeros((count, width), PAIR)
        with np.errstate(over="ignore"):
            block["score"] = scores
        finite = np.isfinite(block["score"])
        wrong = ~finite if written is None else ~finite & written
        if wrong.any():
            raise NumericsError(
                f"row {rows[np.argmax(wrong.any(axis=1))]} of the scores holds NaN or infinity; "
                "expected finite numbers; check the model and data, or compute in fp32"
            )
        block["written"] = True
        cells = block.view(np.uint64)
        columns = slice(first_query, last)
        if written is not None and not written.all():
            cells = np.where(written, cells, self._cells[rows, columns])
        self._cells[rows, columns] = cells

    def flush(self) -> None:
        """Have the operating system put onto the disk what was written so far.

        Raises:
            OutputError: If the disk reports an error.
        """
        try:
            self._pairs.flush()
        except OSError as error:
            raise output_error(error, self.folder) from error


class ScoreStore:
    """Reads a score store, written here or by bergson.

    Args:
        path: The folder of `info.json` and `scores.bin`.

    Attributes:
        documents: Documents that the store holds.
        rows: Rows: documents, or positions if the scores are per token.
        queries: Scores of each row.
        offsets: Per token: document i has the rows offsets[i] to offsets[i + 1]; otherwise None.
        candidates: Document i is the data set's candidates[i]; None if all were scored.

    Raises:
        CheckpointError: If a file is missing, damaged or doesn't fit the others or the manifest.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_files(self.path, {INFO, SCORES, OFFSETS, CANDIDATES}.__contains__)
        info = read_info(self.path)
        try:
            self.documents, self.rows, self.queries = (
                count_of(info, name) for name in ("num_items", "num_rows", "num_scores")
            )
            dtype, pair, row = read_layout(info["dtype"], self.queries)
            per_token = bool(info.get("attribute_tokens"))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path / INFO} doesn't describe scores ({quoted(error)}); expected what "
                f"bergson writes; {REMEDY}"
            ) from None
        self.offsets = read_array(self.path / OFFSETS) if per_token else None
        has_candidates = (self.path / CANDIDATES).exists()
        self.candidates = read_array(self.path / CANDIDATES) if has_candidates else None
        try:
            checked_extras(self.documents, self.rows, self.offsets, self.candidates)
        except ValueError as error:
            raise CheckpointError(f"{self.path} is damaged: {error}; {REMEDY}") from None
        if self.offsets is None and self.rows != self.documents:
            raise CheckpointError(
                f"{self.path / INFO} has {self.rows} rows for {self.documents} documents; "
                f"expected one each; {REMEDY}"
            )
        check_size(self.path / SCORES, self.rows * row)
        data = np.memmap(self.path / SCORES, dtype=np.uint8, mode="r", shape=(self.rows, row))
        shape, strides = (self.rows, self.queries), (row, pair)
        self._scores: np.ndarray = np.ndarray(shape, dtype, buffer=data, strides=strides)
        self._written: np.ndarray = np.ndarray(
            shape, np.bool_, buffer=data, offset=dtype.itemsize, strides=strides
        )

    def read(self, query: int) -> tuple[Float32[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
        """One query's scores, and which of them were written; all of them finite."""
        return self._finite(self._scores[:, query]), self._written[:, query].copy()

    def read_all(self) -> Float32[np.ndarray, "row query"]:
        """Every score; 0 where none was written; all of them finite."""
        return self._finite(self._scores)

    def _finite(self, scores: np.ndarray) -> np.ndarray:
        found = scores.astype(np.float32)
        if not np.isfinite(found).all():
            row = int(np.argmin(np.isfinite(found).reshape(len(found), -1).all(1)))
            raise NumericsError(
                f"row {row} of {self.path / SCORES} holds NaN or infinity; expected finite "
                f"numbers; {REMEDY}"
            )
        return found

    @property
    def complete(self) -> bool:
        """Whether every score was written."""
        return bool(self._written.all())


def _last(offsets: np.ndarray) -> int:
    return int(offsets[-1]) if offsets.size else 0
