"""A file that is one large matrix, row after row: written in any order, read through a memory map.

Rows are written by their number, so that a pass may make them in the order that suits it. What is
never written is zero.
"""

import os
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jhessians.errors import CheckpointError
from jhessians.files import require_ordinary

DTYPES = {
    each.name: each
    for each in map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
}
"""Number formats of stored gradients, by numpy's name."""


class RowFile:
    """Writes a matrix [row, column] to a file; a context manager that closes it.

    Args:
        path: The file, which is made unless it is there; then it is continued.
        rows, width: The matrix's shape.
        dtype: Its number format, one of `DTYPES`.

    Raises:
        OSError: If it can't be made.
    """

    def __init__(self, path: Path, rows: int, width: int, dtype: np.dtype):
        self.rows, self.width, self.dtype = rows, width, dtype
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.truncate(self._file, rows * width * dtype.itemsize)
        except OSError:
            os.close(self._file)
            raise

    def write(self, row: int, column: int, values: Shaped[np.ndarray, "n d"]) -> int:
        """Write a block of the matrix.

        Numbers beyond the range of the format are cut to its largest one, as torch bergson does.

        Args:
            row: Of its first entry.
            column: Of its first entry.
            values: Finite numbers.

        Returns:
            How many numbers were cut.

        Raises:
            ValueError: If the block doesn't lie in the matrix.
            OSError: If the disk is full or fails.
        """
        n, d = values.shape
        if row < 0 or column < 0 or row + n > self.rows or column + d > self.width:
            whole = f"{self.rows} x {self.width}"
            raise ValueError(f"a block of {n} x {d} at {row}, {column} does not lie in {whole}")
        values, cut = _narrowed(values, self.dtype)
        if d == self.width:
            self._write(row, 0, values)
        else:
            for number, each in enumerate(values):
                self._write(row + number, column, each)
        return cut

    def _write(self, row: int, column: int, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        place = (row * self.width + column) * self.dtype.itemsize
        while data.nbytes:
            done = os.pwrite(self._file, data, place)
            data, place = data[done:], place + done

    def flush(self) -> None:
        """Have all that was written put onto the disk.

        Raises:
            OSError: If the disk reports an error.
        """
        os.fsync(self._file)

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)


def map_rows(path: Path, rows: int, width: int, dtype: np.dtype) -> np.memmap:
    """A matrix that `RowFile` or torch bergson wrote, [row, column]; nothing is read yet.

    Returns:
        The matrix, read-only.

    Raises:
        CheckpointError: If the file is missing, or has another size.
    """
    expected = rows * width * dtype.itemsize
    try:
        size = require_ordinary(path).st_size
        if size != expected:
            raise CheckpointError(
                f"{path} has {size:,} bytes; expected {expected:,}, {rows:,} rows of {width:,} "
                f"{dtype.name} numbers: restore it or build it again"
            )
        return np.memmap(path, dtype=dtype, mode="r", shape=(rows, width))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}); restore it or build it again"
        ) from None


def _narrowed(values: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """The numbers in another format, those beyond its range cut, and how many these were."""
    if dtype.itemsize >= values.dtype.itemsize and dtype.name != "float16":
        return values.astype(dtype, copy=False), 0
    largest = float(ml_dtypes.finfo(dtype).max)
    beyond = int(np.count_nonzero(np.abs(values) > largest))
    if beyond:
        values = np.clip(values, -largest, largest)
    return values.astype(dtype), beyond
