"""Read and write torch's `.pt`, `.pth` and `.bin` files, without torch.

Values are nested dicts, lists and tuples of None, bool, int, float, str and arrays. Reading
runs nothing that a file asks for (`_safe_pickle`): a file with anything else in it is refused.
Writing gives what `torch.load(path, weights_only=True)` reads, the same bytes for the same
value. Checksums of a zip archive are compared, which torch doesn't do.

References:
    torch `torch/serialization.py`; layout in `_torch_container`.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jhessians.files import open_input
from jhessians.interop import _safe_pickle
from jhessians.interop._torch_container import (
    CHANGED,
    Extent,
    checkpoint_error,
    open_container,
    stamp_of,
)
from jhessians.interop._torch_records import RefusedPickleError, TensorRecord, need
from jhessians.interop._torch_writer import save

__all__ = ["LazyTensor", "load", "open_torch_file", "save"]

# Expanded tensors (stride 0) hold more elements than their storage. A file of a few bytes may
# not claim unbounded memory, so the surplus is limited per file.
_MAX_EXPANDED_BYTES = 256 * 2**20
_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that stays in its file until `read` is called.

    Attributes:
        shape: The tensor's shape in torch.
        dtype: numpy's dtype; bfloat16 and float8 are those of ml_dtypes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    _path: Path
    _extent: Extent  # from the tensor's first element to its last
    _byte_strides: tuple[int, ...]
    _stamp: tuple[int, int]
    _storage: Extent  # in which it lies
    _compared: set[Extent] = field(compare=False)  # storages whose checksum was found right

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The tensor's values, C-contiguous and writable; opens the file for this read alone.

        Returns:
            An array of the tensor's shape and dtype.

        Raises:
            CheckpointError: The file is gone, damaged, has changed since it was opened, or the
                tensor does not fit in memory.
        """
        try:
            with open_input(self._path) as file:
                need(stamp_of(file) == self._stamp, "the file has changed since it was opened")
                raw = _read_bytes(file, self._extent)
                if self._storage not in self._compared and self._extent.nbytes:
                    whole = raw.nbytes == self._storage.nbytes
                    _compare(self._storage, [raw] if whole else _chunks(file, self._storage))
                    self._compared.add(self._storage)
            _as_truth(raw, self.dtype)
            return np.asarray(_view(raw, 0, self), order="C")
        except (OSError, RefusedPickleError, MemoryError) as error:
            raise checkpoint_error(self._path, error) from None


def open_torch_file(path: str | Path) -> Any:
    """Read a torch file's structure, leaving its tensors on disk.

    Only the pickle is read into memory. Each tensor is later read from its own part of the file,
    also if it shares a storage with others or is a view with strides.

    Args:
        path: A file of `torch.save`, zip or legacy, protocol 2 to 5.

    Returns:
        The saved value with `LazyTensor` in place of tensors and parameters; `torch.Size`
        becomes a tuple, attributes of a state_dict (`_metadata`) are dropped.

    Raises:
        CheckpointError: The file is missing, damaged, not torch's, big-endian, compressed, or
            holds anything but tensors, containers, numbers and strings.
    """
    return _open(path, lambda tensor, start: tensor)


def load(path: str | Path) -> Any:
    """Read a whole torch file, with numpy arrays in place of tensors.

    Each storage is read once: arrays that shared memory in torch share it here, and a view may
    be non-contiguous.

    Args:
        path: A file of `torch.save`, zip or legacy, protocol 2 to 5.

    Returns:
        What was saved, in Python's own containers.

    Raises:
        CheckpointError: If `open_torch_file` would refuse it, or it does not fit in memory.
    """
    whole: dict[tuple[Extent, bool], np.ndarray] = {}

    def read(tensor: LazyTensor, storage: Extent) -> np.ndarray:
        key = (storage, tensor.dtype == np.bool_)
        if key not in whole:
            try:
                with open_input(tensor._path) as file:
                    need(stamp_of(file) == tensor._stamp, "the file changed while it was read")
                    raw = _read_bytes(file, storage)
            except OSError as error:
                raise RefusedPickleError(error.strerror) from None
            _compare(storage, [raw])
            whole[key] = _as_truth(raw, tensor.dtype)
        return _view(whole[key], tensor._extent.start - storage.start, tensor)

    return _open(path, read)


def _open(path: str | Path, give: Callable[[LazyTensor, Extent], Any]) -> Any:
    path = Path(path).absolute()
    container = open_container(path)
    expanded, compared = 0, set[Extent]()

    def tensor(record: TensorRecord) -> Any:
        nonlocal expanded
        storage = container.storages[record.storage.key]
        lazy = _place(record, storage, path, container.stamp, compared)
        expanded += max(0, math.prod(lazy.shape) * lazy.dtype.itemsize - storage.nbytes)
        need(
            expanded <= _MAX_EXPANDED_BYTES,
            "expanded tensors of {} bytes more than stored; save them after .contiguous()",
            expanded,
        )
        return give(lazy, storage)

    try:
        return _safe_pickle.finish(container.value, tensor)
    except (RefusedPickleError, MemoryError) as error:
        raise checkpoint_error(path, error) from None


def _place(
    record: TensorRecord, storage: Extent, path: Path, stamp: tuple[int, int], compared: set[Extent]
) -> LazyTensor:
    """Turn element counts into bytes, and check that the tensor lies within its storage."""
    itemsize, shape = record.dtype.itemsize, record.shape
    # Also for a tensor without elements, whose other dimensions numpy multiplies all the same.
    addressable = math.prod(max(size, 1) for size in shape) * itemsize < 2**62
    need(addressable, f"a tensor's shape needs more than 2**62 bytes ({len(shape)} dimensions)")
    if 0 in shape:
        nowhere, none = Extent(storage.start, 0), (0,) * len(shape)
        return LazyTensor(shape, record.dtype, path, nowhere, none, stamp, storage, compared)
    # The stride of a dimension of size 1 is never used and may be anything.
    strides = tuple(s if n > 1 else 0 for n, s in zip(shape, record.strides, strict=True))
    count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    first, nbytes = record.offset * itemsize, count * itemsize
    need(first + nbytes <= storage.nbytes, "a tensor reaches beyond storage {}", record.storage.key)
    byte_strides = tuple(stride * itemsize for stride in strides)
    extent = Extent(storage.start + first, nbytes)
    return LazyTensor(shape, record.dtype, path, extent, byte_strides, stamp, storage, compared)


def _read_bytes(file: BufferedReader, extent: Extent) -> np.ndarray:
    raw = np.empty(extent.nbytes, np.uint8)
    file.seek(extent.start)
    need(file.readinto(raw.data) == extent.nbytes, "the file ends early")
    return raw


def _chunks(file: BufferedReader, extent: Extent) -> Iterator[np.ndarray]:
    for start in range(0, extent.nbytes, _CHUNK_BYTES):
        yield _read_bytes(
            file, Extent(extent.start + start, min(_CHUNK_BYTES, extent.nbytes - start))
        )


def _compare(storage: Extent, chunks: Iterable[np.ndarray]) -> None:
    """Refuse a storage whose bytes have another checksum than the file says."""
    if storage.crc is None:
        return
    found = 0
    for chunk in chunks:
        found = zlib.crc32(chunk.data, found)
    need(found == storage.crc, CHANGED)


def _as_truth(raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Make bytes that stand for truth values 0 or 1: numpy is undefined for others."""
    if dtype == np.bool_:
        np.not_equal(raw, 0, out=raw, casting="unsafe")
    return raw


def _view(raw: np.ndarray, start: int, tensor: LazyTensor) -> np.ndarray:
    """`tensor` as a view of `raw` bytes, whose first element is at `start`."""
    return np.ndarray(tensor.shape, tensor.dtype, raw, start, tensor._byte_strides)
