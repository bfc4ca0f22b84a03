"""Find the pickle and the storages in a torch file, of the zip format or the legacy one.

Zip (torch 1.6 and later): one folder with `data.pkl`, `byteorder` and `data/KEY` per storage,
all members stored uncompressed, so a storage is a range of the file. Legacy: five pickles in a
row (magic number, version, system, value, storage keys), then each storage as a 64-bit
element count and its bytes.

References:
    torch `torch/serialization.py`, `caffe2/serialize/inline_container.h`; PKWARE APPNOTE 6.3.
"""

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

from jhessians.errors import CheckpointError
from jhessians.files import open_input
from jhessians.interop import _safe_pickle
from jhessians.interop._torch_records import RefusedPickleError, StorageRecord, need, quoted

_MAX_DIRECTORY_BYTES = 16 * 2**20
_MAX_TAIL_BYTES = 2**17  # zipfile reads the end of the file so: a record and a comment
_LOCAL_HEADER_BYTES = 30
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
CHANGED = "it is damaged: its content has another checksum (CRC-32) than its directory says"
_CONVERT = "load it with torch and save its state_dict again"


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of the file, in bytes, and the CRC-32 that a zip directory says it has."""

    start: int
    nbytes: int
    crc: int | None = None


@dataclass(frozen=True, slots=True)
class TorchContainer:
    """A torch file's value, with a `TensorRecord` for each tensor, and its storages' places.

    `stamp` is the file's size and modification time in ns, to notice if it is replaced later.
    """

    value: Any
    storages: dict[str, Extent]
    stamp: tuple[int, int]


def stamp_of(file: BufferedReader) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds of an open file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def checkpoint_error(path: Path, reason: object) -> CheckpointError:
    """The one-line error of a file that can't be read as a torch file."""
    return CheckpointError(" ".join(f"{path}: {reason}".split()))


def open_container(path: Path) -> TorchContainer:
    """Read a torch file's pickle and directory; no storage is read.

    Returns:
        The pickled value with a record for each tensor, and where each storage lies in the file.

    Raises:
        CheckpointError: The file is missing, damaged, hostile, or not of these formats.
    """
    try:
        with open_input(path) as file:
            start = file.read(4)
            need(bool(start), "the file is empty")
            value, storages = (_read_zip if start[:2] == b"PK" else _read_legacy)(file)
            return TorchContainer(value, storages, stamp_of(file))
    except OSError as error:
        raise checkpoint_error(path, error.strerror) from None
    except (ValueError, MemoryError) as error:  # RefusedPickleError is a ValueError
        raise checkpoint_error(path, str(error) or "does not fit in memory") from None


class _BoundedFile:
    """A file for zipfile, which refuses to read more at once than a real zip directory takes."""

    def __init__(self, file: BufferedReader):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1, /) -> bytes:
        need(size <= _MAX_DIRECTORY_BYTES, "the zip directory is too large")
        return self._file.read(_MAX_TAIL_BYTES if size < 0 else size)


def _zip_members(file: BufferedReader) -> tuple[dict[str, zipfile.ZipInfo], int]:
    """Members of the zip archive by name, and where its directory begins."""
    try:
        with zipfile.ZipFile(_BoundedFile(file)) as archive:
            members, start = archive.infolist(), archive.start_dir
    except RefusedPickleError:
        raise
    except Exception as error:  # a bad directory brings out struct.error and more
        raise RefusedPickleError(f"damaged or truncated zip archive ({error})") from None
    named: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        name = member.filename
        plain = ".." not in PurePosixPath(name).parts and not name.startswith("/")
        need(plain and "\\" not in name, "zip member {} has an unsafe name", name)
        need(name not in named, "the zip archive holds {} twice", name)
        stored = member.compress_type == zipfile.ZIP_STORED
        need(stored, f"zip member {{}} is compressed; {_CONVERT}", name)
        need(not member.flag_bits & 1, "zip member {} is encrypted", name)
        need(member.file_size == member.compress_size, "zip member {} has two sizes", name)
        named[name] = member
    return named, start


def _zip_extents(file: BufferedReader) -> dict[str, Extent]:
    """The range of bytes of each member, checked to be in the file and not to overlap."""
    members, end = _zip_members(file)
    # torch can be told to leave all checksums at zero.
    checked = any(member.CRC for member in members.values())
    extents: dict[str, Extent] = {}
    for member in sorted(members.values(), key=lambda member: member.header_offset, reverse=True):
        need(member.header_offset >= 0, "zip member {} begins before the file", member.filename)
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        is_header = len(header) == _LOCAL_HEADER_BYTES and header[:4] == b"PK\x03\x04"
        need(is_header, "zip member {} is not where the directory says", member.filename)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        start = member.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        fits = start + member.file_size <= end
        need(fits, "zip member {} overlaps what follows it", member.filename)
        crc = member.CRC if checked else None
        extents[member.filename] = Extent(start, member.file_size, crc)
        end = member.header_offset
    return extents


def _read_extent(file: BufferedReader, extent: Extent, limit: int) -> bytes:
    need(extent.nbytes <= limit, "the file's pickle or a note beside it is too large")
    file.seek(extent.start)
    found = file.read(extent.nbytes)
    need(len(found) == extent.nbytes, "the file ends early")
    need(extent.crc in (None, zlib.crc32(found)), CHANGED)
    return found


def _read_zip(file: BufferedReader) -> tuple[Any, dict[str, Extent]]:
    extents = _zip_extents(file)
    pickles = [name for name in extents if name.count("/") == 1 and name.endswith("/data.pkl")]
    need(len(pickles) == 1, "a zip archive, but not one of torch.save (no single data.pkl)")
    folder = pickles[0].removesuffix("data.pkl")
    need(f"{folder}constants.pkl" not in extents, f"a TorchScript archive; {_CONVERT}")
    if f"{folder}byteorder" in extents:
        order = _read_extent(file, extents[f"{folder}byteorder"], 16).decode("latin-1")
        need(order == "little", f"byte order {{}}; only little-endian is read; {_CONVERT}", order)
    program = _read_extent(file, extents[pickles[0]], _safe_pickle.MAX_PROGRAM_BYTES)
    value, end, records = _safe_pickle.run(program)
    need(end == len(program), "bytes follow the end of the pickle")
    storages = {}
    for key, record in records.items():
        extent = extents.get(f"{folder}data/{key}")
        if extent is None:
            raise RefusedPickleError(f"storage {key} is missing")
        _check_size(record, extent.nbytes)
        storages[key] = extent
    return value, storages


def _check_size(record: StorageRecord, nbytes: int) -> None:
    if record.nbytes != nbytes:
        wanted = quoted(record.nbytes)
        raise RefusedPickleError(f"storage {record.key} should have {wanted} bytes, has {nbytes}")


def _read_legacy(file: BufferedReader) -> tuple[Any, dict[str, Extent]]:
    file.seek(0)
    size = stamp_of(file)[0]
    head = file.read(min(size, _safe_pickle.MAX_PROGRAM_BYTES))  # makes room for all it may read
    is_pickle = head[:3] == b"\x80\x02\x8a"
    need(is_pickle, f"not a file of torch.save, neither zip nor legacy; {_CONVERT}")
    magic, end, _ = _safe_pickle.run(head)
    need(magic == _LEGACY_MAGIC, "a pickle, but not of torch.save (magic number differs)")
    version, end, _ = _safe_pickle.run(head, end)
    need(version == _LEGACY_VERSION, "legacy torch format {}; 1001 is read", version)
    system, end, _ = _safe_pickle.run(head, end)
    little = type(system) is dict and system.get("little_endian") is True
    need(little, f"only little-endian files are read; {_CONVERT}")
    value, end, records = _safe_pickle.run(head, end)
    keys, end, _ = _safe_pickle.run(head, end)
    known = type(keys) is list and all(type(key) is str and key in records for key in keys)
    need(known and len(keys) == len(set(keys)) == len(records), "the storage keys do not match")
    storages = {}
    for key in keys:
        record = records[key]
        file.seek(end)
        count = file.read(8)
        need(len(count) == 8, "the file ends early")
        claimed = struct.unpack("<q", count)[0]
        need(claimed == record.count, "storage {} differs in size from its tensors", key)
        storages[key] = Extent(end + 8, record.nbytes)
        end += 8 + record.nbytes
        need(end <= size, "the file ends early: storage {} is cut off", key)
    need(end == size, "bytes follow the last storage")
    return value, storages
