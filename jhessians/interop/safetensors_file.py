"""safetensors files, read one tensor or a part of one at a time, and written one at a time.

Plain reads rather than a memory map: a map's pages count as this process's memory for as long as
the file is open, and a file that shrinks under a map kills the process.

References:
    safetensors' format: 8 bytes little-endian header length, JSON header, then the tensors.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jhessians.errors import CheckpointError, quoted, shown
from jhessians.files import open_input, parse_json

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""safetensors' name → numpy's dtype."""

_LONGEST_HEADER = 100 * 2**20  # the format's own limit
_MOST_AXES = 32
_REMEDY = "get a whole copy of it"


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor in a safetensors file, read when asked."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the values in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The values, C-contiguous and writable; opens the file for this read alone.

        Returns:
            An array of the tensor's shape and dtype.

        Raises:
            CheckpointError: If the file is gone or has become shorter.
        """
        return self.read_slice((slice(None),) * len(self.shape))

    def read_slice(self, index: Sequence[slice]) -> Shaped[np.ndarray, "..."]:
        """A part of the values, of which nothing else is read; otherwise as `read`.

        Args:
            index: One slice per axis, without a step.

        Returns:
            The part, C-contiguous and writable.

        Raises:
            CheckpointError: If the file is gone or has become shorter.
        """
        bounds = [part.indices(n)[:2] for part, n in zip(index, self.shape, strict=True)]
        shape = tuple(stop - start for start, stop in bounds)
        # Behind the last axis that is cut, what is wanted lies in one piece.
        cut = [axis for axis, n in enumerate(shape) if n != self.shape[axis]]
        outer = cut[-1] if cut else 0
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(shape))]
        values = np.empty(shape, self.dtype)
        pieces = values.reshape((*shape[:outer], math.prod(shape[outer:]))).view(np.uint8)
        first = sum(start * stride for (start, _), stride in zip(bounds, strides, strict=True))
        try:
            with open_input(self.path, buffering=0) as file:
                for place in np.ndindex(pieces.shape[:-1]):
                    inside = sum(i * strides[axis] for axis, i in enumerate(place))
                    file.seek(self.start + (first + inside) * self.dtype.itemsize)
                    view = pieces[place].data
                    # One raw read gives at most 2 GiB.
                    while view and (count := file.readinto(view)):
                        view = view[count:]
                    if view:
                        raise CheckpointError(
                            f"{self.path} became shorter while it was read; expected that it "
                            f"stays as it was; {_REMEDY}"
                        )
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}; {_REMEDY}") from None
        return values


def open_safetensors(path: Path) -> dict[str, SafetensorsTensor]:
    """The tensors of a file by name, as they follow one another, after checking that all is there.

    Returns:
        Name → a tensor that knows its shape and dtype and reads its values on demand.

    Raises:
        CheckpointError: If the file is cut short or isn't a safetensors file, names a tensor twice,
            or has tensors that overlap or leave a gap.
    """
    return open_described(path)[0]


def open_described(path: Path) -> tuple[dict[str, SafetensorsTensor], dict[str, str]]:
    """As `open_safetensors`, with the words that the file has for other readers.

    Returns:
        The tensors, and the metadata.

    Raises:
        CheckpointError: As `open_safetensors`.
    """
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise _damaged(path, f"its {size} bytes do not hold the header")
            header = parse_json(file.read(length), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from None
    except _RepeatedNameError as error:
        raise CheckpointError(
            f"{path} names {shown(error.args[0])} twice; expected one tensor per name; {_REMEDY}"
        ) from None
    except ValueError:
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise _damaged(path, "its metadata is no table of words")
    tensors = [(name, _entry(path, name, entry, 8 + length)) for name, entry in header.items()]
    tensors.sort(key=lambda named: (named[1].start, named[1].nbytes))
    end = 8 + length
    for name, tensor in tensors:
        if tensor.start != end:
            raise _damaged(
                path, f"{shown(name)} begins at byte {tensor.start} where {end} is expected"
            )
        end += tensor.nbytes
    if end != size:
        raise _damaged(path, f"it has {size} bytes where its header promises {end}")
    return dict(tensors), metadata


def safetensors_header(
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, int]]:
    """A file's beginning, padded so that the tensors start aligned.

    Args:
        tensors: Shape and dtype by name, in the order in which they will follow.
        metadata: Words for other readers.

    Returns:
        The bytes, and where in the file each tensor starts.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offsets, offset = {}, 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [offset, end]}
        offsets[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + at for n, at in offsets.items()}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    values: Iterable[Shaped[np.ndarray, "..."]],
) -> None:
    """Write a file whose tensors are produced one at a time.

    Args:
        path: The new file.
        tensors: Shape and dtype by name, in the order in which they are written.
        values: The tensors, in that order.

    Raises:
        OSError: If the disk is full or not ours to write to.
    """
    header, _ = safetensors_header(tensors, {"format": "pt"})  # transformers asks for it
    with path.open("xb") as file:
        file.write(header)
        for value in values:
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def _entry(path: Path, name: str, entry: Any, data: int) -> SafetensorsTensor:
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        understood = isinstance(shape, list) and all(map(_is_count, (*shape, start, end)))
    except (KeyError, TypeError, ValueError):
        understood = False
    if not understood:
        raise _damaged(path, f"its entry of {shown(name)} can't be understood")
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{shown(name)} in {path} is stored as {quoted(code)}; expected one of "
            f"{', '.join(DTYPES)}"
        )
    # Also of a tensor without values, whose other axes numpy multiplies all the same.
    if len(shape) > _MOST_AXES or math.prod(max(n, 1) for n in shape) >= 2**59:
        raise _damaged(path, f"{shown(name)} has the shape {quoted(shape)}")
    tensor = SafetensorsTensor(path, tuple(shape), DTYPES[code], data + start)
    if end - start != tensor.nbytes:
        raise _damaged(path, f"its entry of {shown(name)} contradicts itself")
    return tensor


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged: {what}; {_REMEDY}")


class _RepeatedNameError(Exception):
    pass


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise _RepeatedNameError(name)
        seen.add(name)
    return dict(pairs)
