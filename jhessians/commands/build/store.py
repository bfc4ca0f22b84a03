"""The file that rows go to: each to its place, added up, or nowhere on hosts that do not write."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from jhessians.commands.build.config import BuildConfig
from jhessians.devices.hosts import most_of_hosts
from jhessians.fitting.checkpoints import Series
from jhessians.influence.gradients import GradientPass, StoredRows
from jhessians.interop.gradient_store import GradientWriter
from jhessians.interop.layout import DTYPES
from jhessians.interop.low_rank_store import write_low_rank
from jhessians.interop.row_file import RowFile


class Store:
    """Takes rows in any order; a context manager, behind which the file is complete.

    Args:
        file: To write to; None on a host that doesn't write.
        rows: How many rows are stored.
        documents: How many documents the data has.
        width: Numbers of a row.
        aggregation: Whether rows are added up to one (`sum`), and divided by the number of
            documents (`mean`); `none` if each is stored.

    Attributes:
        rows: How many rows are stored.
        cut: How many numbers lay beyond the range of the format.
    """

    def __init__(
        self,
        file: GradientWriter | RowFile | None,
        *,
        rows: int,
        documents: int,
        width: int,
        aggregation: str = "none",
    ):
        self._file, self.rows, self._documents = file, rows, documents
        self._aggregation = aggregation
        # In float64, so that the order in which batches come does not matter.
        self._total = np.zeros((1, width)) if aggregation != "none" else None
        self.cut = 0

    def add(self, rows: StoredRows) -> None:
        """Take a document's rows.

        Raises:
            OSError: If the disk is full or fails.
        """
        if self._file is None:
            return
        if self._total is not None:
            self._total += rows.values.sum(0, dtype=np.float64, keepdims=True)
        else:
            self._write(rows.first, rows.values)

    @property
    def state(self) -> tuple[np.ndarray, ...]:
        """The sum so far, if rows are added up; otherwise a zero, since something must be saved."""
        return (np.zeros((1, 1)) if self._total is None else self._total,)

    def take_up(self, state: tuple[np.ndarray, ...], cut: int) -> None:
        """Go on from what another store had, its `state` and `cut`."""
        if self._total is not None:
            (self._total,) = state
        self.cut = cut
        if isinstance(self._file, GradientWriter):
            self._file.cut = cut

    def flush(self) -> None:
        """Have all rows that were taken put onto the disk.

        Raises:
            OSError: If the disk is full or fails.
        """
        if self._file is not None:
            self._file.flush()

    def _write(self, first: int, values: np.ndarray) -> None:
        assert self._file is not None
        if isinstance(self._file, RowFile):
            self.cut += self._file.write(first, 0, values)
        else:
            self._file.write(first, values)
            self.cut = self._file.cut

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        try:
            if error is None and self._total is not None:
                mean = self._aggregation == "mean"
                self._write(0, self._total / (self._documents if mean else 1))
        finally:
            self._file.__exit__(kind, error, trace)


def open_store(config: BuildConfig, making: GradientPass, part: Path, *, writer: bool) -> Store:
    """Begin the store that the options ask for.

    Args:
        config: The options.
        making: The pass that makes the rows.
        part: The folder.
        writer: Whether this host writes.

    Returns:
        The store, to which rows are added.

    Raises:
        OSError: If a file can't be made.
    """
    aggregated = config.aggregation != "none"
    rows = 1 if aggregated else making.row_count
    dtype = DTYPES[config.stored_as][1]
    file: GradientWriter | RowFile | None = None
    if writer and config.rank:
        file = write_low_rank(part, making.shapes, config.rank, dtype, rows)
    elif writer:
        counts = making.counts if config.attribute_tokens else None
        file = GradientWriter(part, making.sizes, dtype, rows, counts=counts)
    return Store(
        file, rows=rows, documents=len(making.counts), width=making.width,
        aggregation=config.aggregation,
    )  # fmt: skip


class Place:
    """How far a pass has come, saved now and then.

    Args:
        kept: Where that is saved, and from where it is continued.
        making: The pass.
        store: What takes its rows.

    Attributes:
        batches: How many are done.
    """

    def __init__(self, kept: Series, making: GradientPass, store: Store):
        self._kept, self._making, self._store = kept, making, store
        self.batches = 0
        formats = tuple(array.dtype for array in store.state)
        if saved := kept.load(lambda position: formats):
            self.batches = saved.position["batches"]
            making.kept, making.square = saved.position["kept"], saved.position["square"]
            store.take_up(saved.arrays, saved.position["cut"])

    def move(self, *, failed: bool) -> None:
        """Count a batch, and save if it is time.

        Args:
            failed: Whether its rows could not be stored, so that there is nothing to save.

        Raises:
            OSError: If the disk is full or fails.
        """
        self.batches += 1
        if not self._kept.due() or most_of_hosts(int(failed)):
            return
        self._store.flush()
        position = {"batches": self.batches, "cut": self._store.cut,
                    "kept": self._making.kept, "square": self._making.square}  # fmt: skip
        self._kept.save(position, self._store.state)
