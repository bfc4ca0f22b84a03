"""The files of a score store: what `info.json` says, how they are made, and checked when opened.

bergson declares a row of `scores.bin` as a struct of 2 · queries fields: `score_0`, `written_0`, …
"""

import io
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jhessians.errors import CheckpointError, OutputError

INFO, SCORES, OFFSETS, CANDIDATES = "info.json", "scores.bin", "offsets.npy", "candidates.npy"

_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
# What is written here: float32, padded with its flag to the next power of two.
PAIR = np.dtype(
    {"names": ["score", "written"], "formats": ["f4", "?"], "offsets": [0, 4], "itemsize": 8}
)
_ZEROS = bytes(1 << 20)
REMEDY = "score again or get a whole copy"


def needed_bytes(rows: int, queries: int) -> int:
    """Size of `scores.bin` for so many documents (or, per token, positions) and queries."""
    return rows * queries * PAIR.itemsize


def store_info(documents: int, rows: int, queries: int, *, per_token: bool) -> dict[str, Any]:
    """The description that bergson's readers build a numpy dtype from."""
    size = PAIR.itemsize
    return {
        "attribute_tokens": per_token,
        "num_items": documents,
        "num_rows": rows,
        "num_scores": queries,
        "dtype": {
            "names": [f"{name}_{i}" for i in range(queries) for name in ("score", "written")],
            "formats": ["float32", "bool"] * queries,
            "offsets": [i * size + at for i in range(queries) for at in (0, 4)],
            "itemsize": queries * size,
        },
    }


def checked_extras(
    documents: int, rows: int, offsets: np.ndarray | None, candidates: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The arrays beside the scores by file name, checked.

    Returns:
        File name → int64 array, of those that there are.

    Raises:
        ValueError: If one doesn't fit the number of documents and rows.
    """
    arrays: dict[str, np.ndarray] = {}
    if offsets is not None:
        if offsets.shape != (documents + 1,) or offsets[0] != 0 or np.any(np.diff(offsets) < 0):
            raise ValueError(
                f"offsets of shape {offsets.shape} for {documents} documents; expected one more "
                "than documents, from 0, ascending"
            )
        if offsets[-1] != rows:
            raise ValueError(f"offsets end at {offsets[-1]} of {rows} rows")
        arrays[OFFSETS] = offsets.astype(np.int64)
    if candidates is not None:
        if candidates.shape != (documents,):
            raise ValueError(f"candidates of shape {candidates.shape} for {documents} documents")
        arrays[CANDIDATES] = candidates.astype(np.int64)
    return arrays


def create_files(folder: Path, info: Mapping[str, Any], extras: Mapping[str, np.ndarray]) -> None:
    """Make the files, `info.json` last: a folder without it is begun anew.

    Raises:
        OutputError: If the disk has too little room.
        OSError: If it can't be written to.
    """
    path = folder / SCORES
    path.unlink(missing_ok=True)
    reserve(path, needed_bytes(info["num_rows"], info["num_scores"]))
    for name in (OFFSETS, CANDIDATES):
        (folder / name).unlink(missing_ok=True)
    for name, array in extras.items():
        np.save(folder / name, array)
    part = folder / f"{INFO}.part"
    part.write_text(json.dumps(info, indent=2))
    os.replace(part, folder / INFO)


def reserve(path: Path, size: int) -> None:
    """Take the room of a new file, of zeros, on the disk.

    A disk that fills up later would kill a process that writes to the file's memory map.

    Raises:
        OutputError: If the disk has too little room.
        OSError: If it can't be written to.
    """
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OutputError(
            f"cannot write {path}: the scores need {size / 1e9:.3g} GB and the disk has "
            f"{free / 1e9:.3g} GB; free some space, choose another disk, or score fewer queries"
        )
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, len(_ZEROS)):
                file.write(_ZEROS[: size - start])


def create_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Make a .npy file of zeros in float32, whose room on the disk is taken.

    Returns:
        Its memory map.

    Raises:
        OutputError: If the disk has too little room.
        OSError: If it can't be written to.
    """
    header = io.BytesIO()
    layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    reserve(path, header.tell() + 4 * math.prod(shape))
    with path.open("r+b") as file:
        file.write(header.getvalue())
    array: np.memmap = np.lib.format.open_memmap(path, mode="r+")
    return array


def check_same(folder: Path, info: Mapping[str, Any], extras: Mapping[str, np.ndarray]) -> None:
    """That `folder` holds a store of just these rows and queries.

    Raises:
        OutputError: If it holds another one.
    """
    found = read_info(folder)
    same = found == info and all(
        (folder / name).exists() == (name in extras)
        and (name not in extras or np.array_equal(read_array(folder / name), extras[name]))
        for name in (OFFSETS, CANDIDATES)
    )
    if not same:
        numbers = ("num_items", "num_rows", "num_scores")
        there, here = ([each.get(number) for number in numbers] for each in (found, info))
        raise OutputError(
            f"{folder} holds other scores (documents, rows, queries {there}); expected none, or "
            f"these ({here}) to continue; choose another folder"
        )
    check_size(folder / SCORES, needed_bytes(info["num_rows"], info["num_scores"]))


def check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size is None or size < expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise CheckpointError(f"{path} {found}; expected {expected} bytes; {REMEDY}")


def read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {INFO}; expected a folder of scores; give the one that was written"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {REMEDY}") from None
    if not isinstance(info, dict):
        raise CheckpointError(f"{path} holds no object; expected what bergson writes; {REMEDY}")
    return info


def read_layout(layout: Mapping[str, Any], queries: int) -> tuple[np.dtype, int, int]:
    """How a row lies in the file.

    Returns:
        The scores' dtype, bytes from one pair to the next, and bytes of a row.

    Raises:
        ValueError: If its fields are no pairs of one dtype at one stride.
        KeyError: If the dtype is unknown or something is missing.
    """
    dtype = _DTYPES[layout["formats"][0]]
    itemsize, offsets = int(layout["itemsize"]), layout["offsets"]
    pair = offsets[2] - offsets[0] if queries > 1 else itemsize
    expected = [i * pair + at for i in range(queries) for at in (0, dtype.itemsize)]
    formats = [layout["formats"][0], "bool"] * queries
    if layout["formats"] != formats or offsets != expected or itemsize <= expected[-1]:
        raise ValueError("fields that are no pairs of a score and a flag")
    return dtype, pair, itemsize


def read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {REMEDY}") from None
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise CheckpointError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected whole numbers, a vector; "
            f"{REMEDY}"
        )
    return array
