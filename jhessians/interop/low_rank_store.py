"""A store of documents' gradients as a few outer products each, which torch bergson doesn't have.

    low_rank.json    {rank, num_items, shapes, base_dtype}; `shapes` names the modules in order,
                     each with its [out, in]
    low_rank.bin     [num_items, Σ rank (out + in)], a row for each document; a module's part of it
                     is g [rank, out], then a [rank, in]

A gradient is about gᵀ a = Σ_r g_r a_rᵀ, the largest first. Only numpy is needed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jhessians.errors import CheckpointError
from jhessians.files import read_json
from jhessians.interop.manifest import check_files
from jhessians.interop.row_file import DTYPES, RowFile, map_rows

LOW_RANK_INFO_FILE = "low_rank.json"
LOW_RANK_FILE = "low_rank.bin"

Shapes = Mapping[str, tuple[int, int]]


class LowRankStore:
    """A store on disk, read through a memory map.

    Args:
        root: The folder.

    Attributes:
        root: The folder.
        rank: How many outer products a gradient has.
        shapes: Module → [out, in] of its gradient, in their order.
        dtype: Number format.
        rows: How many documents there are.
        matrix: All of it, [row, column].

    Raises:
        CheckpointError: If a file is missing or damaged, or has another size than the other file
            or the manifest says.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        check_files(self.root, {LOW_RANK_INFO_FILE, LOW_RANK_FILE}.__contains__)
        info = _read_info(self.root / LOW_RANK_INFO_FILE)
        self.rank: int = info["rank"]
        self.rows: int = info["num_items"]
        self.shapes = {name: (o, i) for name, (o, i) in info["shapes"].items()}
        self.dtype = DTYPES[info["base_dtype"]]
        width = row_width(self.shapes, self.rank)
        self.matrix = map_rows(self.root / LOW_RANK_FILE, self.rows, width, self.dtype)

    def factors(
        self, module: str, rows: slice = slice(None)
    ) -> tuple[Shaped[np.ndarray, "n r o"], Shaped[np.ndarray, "n r i"]]:
        """The vectors of a module's outer products, as views of the file.

        Args:
            module: Which.
            rows: Of which documents; by default of all.

        Returns:
            g [document, rank, out] and a [document, rank, in].

        Raises:
            KeyError: If the store has no such module.
        """
        o, i = self.shapes[module]
        before = list(self.shapes)[: list(self.shapes).index(module)]
        start = row_width({name: self.shapes[name] for name in before}, self.rank)
        middle, end = start + self.rank * o, start + self.rank * (o + i)
        part = self.matrix[rows]
        return (
            part[:, start:middle].reshape(len(part), self.rank, o),
            part[:, middle:end].reshape(len(part), self.rank, i),
        )


def row_width(shapes: Shapes, rank: int) -> int:
    """How many numbers a document has."""
    return rank * sum(o + i for o, i in shapes.values())


def write_low_rank(root: Path, shapes: Shapes, rank: int, dtype: np.dtype, rows: int) -> RowFile:
    """Begin a store.

    Args:
        root: The folder, which must exist.
        shapes: Module → [out, in], in the order wanted.
        rank: How many outer products a gradient has.
        dtype: Number format, one of `row_file.DTYPES`.
        rows: How many documents there are.

    Returns:
        The file to write rows to, a context manager.

    Raises:
        OSError: If a file can't be written.
    """
    info = {
        "rank": rank,
        "num_items": rows,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "base_dtype": dtype.name,
    }
    (root / LOW_RANK_INFO_FILE).write_text(json.dumps(info, indent=2), encoding="utf-8")
    return RowFile(root / LOW_RANK_FILE, rows, row_width(shapes, rank), dtype)


def _read_info(file: Path) -> dict[str, Any]:
    try:
        info = read_json(file)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file} ({error.strerror}); expected the folder of a low-rank store"
        ) from None
    except ValueError:
        raise CheckpointError(f"{file} isn't JSON; restore it or build the store again") from None
    if not isinstance(info, dict) or not _is_valid(info):
        raise CheckpointError(
            f"{file} doesn't say rank, num_items, shapes and base_dtype; restore it or build the "
            "store again"
        )
    return info


def _is_valid(info: dict[str, Any]) -> bool:
    shapes = info.get("shapes")
    return (
        all(_is_count(info.get(name)) for name in ("rank", "num_items"))
        and info.get("base_dtype") in list(DTYPES)
        and isinstance(shapes, dict)
        and bool(shapes)
        and all(
            isinstance(each, list) and len(each) == 2 and all(map(_is_count, each))
            for each in shapes.values()
        )
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**62
