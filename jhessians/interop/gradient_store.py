"""torch bergson's store of gradients: a row for each document, or token, and columns by module.

    info.json        {attribute_tokens, num_items, num_grads, grad_sizes, base_dtype}
    gradients.bin    [num_grads, Σ sizes], row after row; `grad_sizes` names the modules in order
    offsets.npy      of tokens: the rows of document n are offsets[n] to offsets[n + 1]

A module's columns are its gradient [out, in] flattened, or what a projection makes of it. Only
numpy is needed, and only what is asked for is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from jhessians.errors import CheckpointError, quoted
from jhessians.files import read_json
from jhessians.interop.manifest import check_files
from jhessians.interop.row_file import DTYPES, RowFile, map_rows
from jhessians.interop.vector_file import read_vector

INFO_FILE = "info.json"
GRADIENTS_FILE = "gradients.bin"
OFFSETS_FILE = "offsets.npy"

GLOBAL = "gradients"
"""bergson's name for the only columns of a projection to which all modules add."""


class GradientStore:
    """A store on disk, read through a memory map.

    Args:
        root: The folder.

    Attributes:
        root: The folder.
        sizes: Module → how many columns it has, in their order.
        dtype: Number format.
        rows: How many there are.
        offsets: Of a store of tokens, where each document's rows begin, [document + 1]; None of a
            store of documents.
        matrix: All of it, [row, column].

    Raises:
        CheckpointError: If a file is missing or damaged, or has another size than the other files
            or the manifest say.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        check_files(self.root, {INFO_FILE, GRADIENTS_FILE, OFFSETS_FILE}.__contains__)
        info = _read_info(self.root)
        self.sizes: dict[str, int] = info["grad_sizes"]
        self.rows: int = info["num_grads"]
        self.dtype = _dtype_of(self.root, info)
        self.offsets = None
        if info["attribute_tokens"]:
            self.offsets = _read_offsets(self.root / OFFSETS_FILE, self.rows)
        self.matrix = map_rows(
            self.root / GRADIENTS_FILE, self.rows, sum(self.sizes.values()), self.dtype
        )
        ends = np.cumsum(list(self.sizes.values())).tolist()
        self._columns = {
            name: slice(end - size, end)
            for (name, size), end in zip(self.sizes.items(), ends, strict=True)
        }

    def columns(self, module: str) -> slice:
        """Where a module's columns lie.

        Returns:
            From the first to behind the last.

        Raises:
            KeyError: If the store has no such module.
        """
        return self._columns[module]

    def module(self, module: str) -> Shaped[np.ndarray, "row column"]:
        """A module's columns of all rows, as a view of the file.

        Returns:
            [row, size]; a part of it is read when it is taken.

        Raises:
            KeyError: If the store has no such module.
        """
        return self.matrix[:, self._columns[module]]


class GradientWriter:
    """Writes a store; a context manager, behind which all files are complete.

    Rows that are never written are zeros, as those of documents without a gradient.

    Args:
        root: The folder, which must exist.
        sizes: Module → how many columns it has, in the order wanted.
        dtype: Number format, one of `row_file.DTYPES`.
        rows: How many rows there are.
        counts: Of a store of tokens, how many of the rows each document has, in order.

    Raises:
        ValueError: If the counts don't add up to the rows.
        OSError: If a file can't be written.
    """

    def __init__(
        self,
        root: Path,
        sizes: Mapping[str, int],
        dtype: np.dtype,
        rows: int,
        *,
        counts: Int[np.ndarray, " document"] | None = None,
    ):
        if counts is not None and int(counts.sum()) != rows:
            raise ValueError(f"documents have {int(counts.sum())} rows; expected {rows}")
        info = {
            "attribute_tokens": counts is not None,
            "num_items": rows if counts is None else len(counts),
            "num_grads": rows,
            "grad_sizes": dict(sizes),
            "base_dtype": dtype.name,
        }
        ends = np.cumsum([0, *sizes.values()]).tolist()
        self._starts = dict(zip(sizes, ends, strict=False))
        if counts is not None:
            np.save(root / OFFSETS_FILE, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        (root / INFO_FILE).write_text(json.dumps(info, indent=2), encoding="utf-8")
        self._file = RowFile(root / GRADIENTS_FILE, rows, ends[-1], dtype)
        self.cut = 0

    def write(
        self, row: int, values: Shaped[np.ndarray, "n d"], *, module: str | None = None
    ) -> None:
        """Write rows that follow one another.

        Args:
            row: The number of the first one.
            values: [row, column], of all modules or of one. Numbers beyond the range of the format
                are cut to its largest, and counted in `cut`.
            module: Whose columns they are; None if all are given.

        Raises:
            ValueError: If they don't fit.
            OSError: If the disk is full or fails.
        """
        self.cut += self._file.write(row, 0 if module is None else self._starts[module], values)

    def flush(self) -> None:
        """Have all that was written put onto the disk; errors are those of `RowFile.flush`."""
        self._file.flush()

    def __enter__(self) -> "GradientWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)


def store_bytes(width: int, dtype: np.dtype, rows: int) -> int:
    """How much space the rows of a store take on disk."""
    return width * rows * dtype.itemsize


def _read_info(root: Path) -> dict[str, Any]:
    file = root / INFO_FILE
    try:
        info = read_json(file)
    except FileNotFoundError:
        raise CheckpointError(
            f"{root} has no {INFO_FILE}; expected the folder of a gradient store: give another, or "
            "build one with jhessians or bergson"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file} ({error.strerror}); expected a gradient store"
        ) from None
    except ValueError:
        raise CheckpointError(f"{file} isn't JSON; restore it or build the store again") from None
    info = {"attribute_tokens": False} | info if isinstance(info, dict) else {}
    sizes, rows = info.get("grad_sizes"), info.get("num_grads")
    if not isinstance(sizes, dict) or not sizes or not all(map(_is_count, sizes.values())):
        raise CheckpointError(
            f"{file} has no table `grad_sizes` of modules; expected that of a gradient store: give "
            "another folder"
        )
    if not _is_count(rows):
        raise CheckpointError(
            f"{file} says `num_grads` is {quoted(rows)}; expected how many rows there are: "
            "restore it or build the store again"
        )
    return info


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**62


def _dtype_of(root: Path, info: Mapping[str, Any]) -> np.dtype:
    name = info.get("base_dtype")
    if name is None:  # a store of an older bergson, a struct with a field for each module
        with_fields = info.get("dtype")
        try:
            field = np.dtype(with_fields["formats"][0])  # type: ignore[index]
            name = field.base.name
        except Exception:  # numpy raises whatever the words lead to
            name = None
    if not isinstance(name, str) or name not in DTYPES:
        raise CheckpointError(
            f"{root / INFO_FILE} says `base_dtype` is {quoted(name)}; expected one of "
            f"{', '.join(DTYPES)}"
        )
    return DTYPES[name]


def _read_offsets(file: Path, rows: int) -> Int[np.ndarray, " bound"]:
    try:
        offsets = read_vector(file)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file} ({error.strerror}), which says whose rows are whose; restore it "
            "or build the store again"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{file} is damaged: {error}; restore it or build the store again"
        ) from None
    ends = offsets[[0, -1]].tolist() if offsets.size else []
    if ends != [0, rows] or (offsets[1:] < offsets[:-1]).any():
        raise CheckpointError(
            f"{file} doesn't divide {rows:,} rows among documents; restore it or build the store "
            "again"
        )
    return offsets
