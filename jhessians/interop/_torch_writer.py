"""Write torch's zip format: a pickle of the structure, then one stored member per storage.

The pickle is protocol 2 without memo, which is enough for `torch.load`; the archive's inner
folder, dates and attributes are fixed, so that equal values give equal bytes.

References:
    CPython `Lib/pickletools.py` (instruction set); torch `torch/serialization.py`.
"""

import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jhessians.errors import OutputError
from jhessians.interop._safe_pickle import MAX_DEPTH, admitted_key
from jhessians.interop._torch_records import STORAGE_DTYPES, UNTYPED_DTYPES

_FOLDER = "archive"
_ALIGNMENT = 64  # torch maps storages of its own files at this alignment
_CHUNK_BYTES = 16 * 2**20
_ZIP64_EXTRA_BYTES = 20
_STORAGE_CLASS = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_UNTYPED_NAME = {dtype: name for name, dtype in UNTYPED_DTYPES.items()}


def save(value: Any, path: str | Path) -> None:
    """Write a file that `torch.load(path, weights_only=True)` reads.

    The file appears whole or not at all. One storage at a time is in memory as bytes.

    Args:
        value: Nested dict, OrderedDict, list and tuple of None, bool, int, float, str, and
            arrays: numpy (scalars and 0-d give 0-d tensors), jax, or `LazyTensor`, which is
            read when its turn comes. The same array object met twice is stored once. dtypes:
            float64/32/16, bfloat16, complex64/128, bool, int8 to int64, uint8 to uint64,
            float8_e4m3fn, float8_e5m2.
        path: Replaced if it exists; its folder must exist.

    Raises:
        TypeError: Something in `value` is not of these kinds.
        ValueError: Nested deeper than 64 levels (or within itself), an integer beyond 255
            bytes, or a dict key that is no scalar.
        OutputError: The file can't be written.
        CheckpointError: A `LazyTensor`'s own file can't be read.
    """
    path = Path(path)
    pickled = _PickleWriter()
    pickled.write(value)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
            _add(file, archive, "data.pkl", [pickled.program()])
            _add(file, archive, "byteorder", [b"little"])
            for key, array in enumerate(pickled.storages):
                _add(file, archive, f"data/{key}", _chunks(array), _nbytes(array))
            _add(file, archive, "version", [b"3\n"])
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)


class _PickleWriter:
    def __init__(self) -> None:
        self.parts: list[bytes] = [b"\x80\x02"]
        self.storages: list[Any] = []
        self._keys: dict[int, int] = {}  # id of an array -> its storage; `storages` keeps it alive

    def program(self) -> bytes:
        return b"".join(self.parts) + b"."

    def write(self, value: Any, depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"value nested deeper than {MAX_DEPTH} levels, or within itself")
        # numpy's scalars come first: np.float64 is a float, yet means a tensor here.
        if isinstance(value, np.generic) or hasattr(value, "dtype"):
            self.write_tensor(value)
        elif value is None or isinstance(value, bool):
            self.parts.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            self.write_int(value)
        elif isinstance(value, float):
            self.parts.append(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            self.write_text(value)
        elif isinstance(value, dict):
            ordered = isinstance(value, OrderedDict)
            self.parts.append(b"ccollections\nOrderedDict\n)R(" if ordered else b"}(")
            for key, item in value.items():
                self.write(admitted_key(key), depth + 1)
                self.write(item, depth + 1)
            self.parts.append(b"u")
        elif isinstance(value, list | tuple):
            self.parts.append(b"](" if isinstance(value, list) else b"(")
            for item in value:
                self.write(item, depth + 1)
            self.parts.append(b"e" if isinstance(value, list) else b"t")
        else:
            raise TypeError(f"a torch file can't hold a {type(value).__name__}; give an array")

    def write_text(self, text: str) -> None:
        encoded = text.encode("utf-8")
        self.parts.append(b"X" + struct.pack("<I", len(encoded)) + encoded)

    def write_int(self, number: int) -> None:
        if -(2**31) <= number < 2**31:
            self.parts.append(b"J" + struct.pack("<i", number))
            return
        nbytes = number.bit_length() // 8 + 1
        if nbytes > 255:
            raise ValueError(f"an integer of {nbytes} bytes; a torch file holds up to 255")
        encoded = number.to_bytes(nbytes, "little", signed=True)
        self.parts.append(b"\x8a" + bytes([nbytes]) + encoded)

    def write_tensor(self, array: Any) -> None:
        dtype = _dtype(array)
        key = self._keys.setdefault(id(array), len(self.storages))
        if key == len(self.storages):
            self.storages.append(array)
        typed = dtype in _STORAGE_CLASS
        storage = f"torch\n{_STORAGE_CLASS[dtype]}" if typed else "torch.storage\nUntypedStorage"
        count = _nbytes(array) // (dtype.itemsize if typed else 1)
        version = "v2" if typed else "v3"
        self.parts.append(f"ctorch._utils\n_rebuild_tensor_{version}\n((".encode())
        self.write_text("storage")
        self.parts.append(f"c{storage}\n".encode())
        self.write_text(str(key))
        self.write_text("cpu")
        self.write_int(count)
        self.parts.append(b"tQ")
        self.write_int(0)  # storage offset
        shape = tuple(int(size) for size in array.shape)
        strides = tuple(
            int(np.prod([max(size, 1) for size in shape[axis + 1 :]], dtype=object))
            for axis in range(len(shape))
        )
        self.write(shape)
        self.write(strides)
        self.parts.append(b"\x89ccollections\nOrderedDict\n)R")  # requires_grad, backward hooks
        if not typed:
            self.parts.append(f"ctorch\n{_UNTYPED_NAME[dtype]}\n".encode())
        self.parts.append(b"tR")


def _dtype(array: Any) -> np.dtype:
    """The array's dtype in little-endian order, one that torch knows."""
    try:
        dtype = np.dtype(array.dtype)
        dtype = dtype if dtype.byteorder != ">" else dtype.newbyteorder("<")
    except TypeError:
        dtype = None
    if dtype not in _STORAGE_CLASS and dtype not in _UNTYPED_NAME:
        kind = type(array).__name__
        raise TypeError(f"a torch file can't hold a {kind} of dtype {array.dtype}; convert it")
    return dtype


def _nbytes(array: Any) -> int:
    return int(np.prod(array.shape, dtype=object)) * _dtype(array).itemsize


def _chunks(array: Any) -> Iterable[memoryview]:
    values = array.read() if hasattr(array, "read") else np.asarray(array)
    values = np.ascontiguousarray(values, dtype=_dtype(array)).reshape(-1).view(np.uint8)
    for start in range(0, values.size, _CHUNK_BYTES):
        yield values[start : start + _CHUNK_BYTES].data


def _add(
    file: BinaryIO,
    archive: zipfile.ZipFile,
    name: str,
    chunks: Iterable[bytes | memoryview],
    nbytes: int = 0,
) -> None:
    """Add a stored member whose bytes start at a multiple of `_ALIGNMENT`."""
    member = zipfile.ZipInfo(f"{_FOLDER}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    member.create_system = 3  # unix, wherever we run
    large = nbytes > zipfile.ZIP64_LIMIT // 2
    header = 30 + len(member.filename) + 4 + (_ZIP64_EXTRA_BYTES if large else 0)
    padding = -(file.tell() + header) % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(member, "w", force_zip64=large) as target:
        for chunk in chunks:
            target.write(chunk)
