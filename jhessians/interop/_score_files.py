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

from jhessians.errors import CheckpointError, OutputError, quoted, shown
from jhessians.files import read_json, require_ordinary
from jhessians.interop.vector_file import read_vector

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


def reserve(path: Path, size: int, head: bytes = b"") -> None:
    """Take the room of a new file on the disk: a head, then zeros.

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
        file.write(head)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(len(head), size, len(_ZEROS)):
                file.write(_ZEROS[: size - start])


def create_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Make a .npy file of zeros in float32, whose room on the disk is taken; one is continued.

    Args:
        path: Of the file.
        shape: Of the array; a file of another one is begun anew.

    Returns:
        Its memory map.

    Raises:
        OutputError: If the disk has too little room.
        OSError: If it can't be written to.
    """
    header = io.BytesIO()
    layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    size = header.tell() + 4 * math.prod(shape)
    if not path.is_file() or path.stat().st_size != size:
        path.unlink(missing_ok=True)
        reserve(path, size, header.getvalue())
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
    try:
        size = require_ordinary(path).st_size
    except FileNotFoundError:
        found = "is missing"
    except OSError as error:
        found = f"can't be read: {error.strerror}"
    else:
        found = f"has {size} bytes"
        if size >= expected:
            return
    raise CheckpointError(f"{path} {found}; expected {expected} bytes; {REMEDY}")


def read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    try:
        info = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {INFO}; expected a folder of scores; give the one that was written"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {REMEDY}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} isn't JSON: {shown(str(error))}; {REMEDY}") from None
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
        TypeError: If something is of another type.
    """
    formats, offsets, itemsize = (layout[name] for name in ("formats", "offsets", "itemsize"))
    if not len(formats) == len(offsets) == 2 * queries or not all(map(_is_whole, offsets)):
        raise ValueError(f"not {2 * queries} fields")
    dtype = _DTYPES[formats[0]]
    pair = offsets[2] - offsets[0] if queries > 1 else itemsize
    expected = [i * pair + at for i in range(queries) for at in (0, dtype.itemsize)]
    fitting = pair > dtype.itemsize and count_of(layout, "itemsize") > expected[-1]
    if formats != [formats[0], "bool"] * queries or offsets != expected or not fitting:
        raise ValueError("fields that are no pairs of a score and a flag")
    return dtype, pair, itemsize


def count_of(table: Mapping[str, Any], name: str) -> int:
    """A positive number of a table.

    Returns:
        The number.

    Raises:
        ValueError: If it is something else.
        KeyError: If it is missing.
    """
    if not _is_whole(table[name]) or table[name] < 1:
        raise ValueError(f"{name} {quoted(table[name])}")
    return int(table[name])


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def read_array(path: Path) -> np.ndarray:
    try:
        return read_vector(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {REMEDY}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; {REMEDY}") from None
