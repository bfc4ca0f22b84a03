"""What says that a folder is a finished result of ours: `manifest.json`, written last.

    {"format": "jhessians", "version": 1, "run_id": "6d0c…", "command": "compute",
     "inputs": {"the data set": "5e88…", …},
     "files": {"config.yaml": {"size": 812, "sha256": "9f86…"}, …}}

Only a folder with a manifest is ever replaced. `jhessians verify` compares sizes and hashes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jhessians.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT, VERSION = "jhessians", 1


class Entry(NamedTuple):
    """One file of a result.

    Attributes:
        size: In bytes.
        sha256: Of its content, in hexadecimal digits.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a result consists of.

    Attributes:
        run_id: Random, of the run that wrote it.
        command: Which command that was, such as "compute".
        files: Path below the result's folder, with slashes → what it has to be.
        inputs: What the run read, such as "the data set" → a hash of it.
    """

    run_id: str
    command: str
    files: dict[str, Entry]
    inputs: dict[str, str] = field(default_factory=dict)


def write_manifest(
    folder: Path, *, run_id: str, command: str, inputs: Mapping[str, str] = MappingProxyType({})
) -> Manifest:
    """Describe a finished result, and see to it that all of it is on the disk.

    Args:
        folder: Holds the result; files whose names begin with a dot are not part of it.
        run_id: Of the run.
        command: Which wrote it.
        inputs: What was read, by hashes.

    Returns:
        What was written.

    Raises:
        OSError: If a file can't be read, or the manifest not be written.
    """
    files: dict[str, Entry] = {}
    known: dict[tuple[int, int], str] = {}  # hard links to one file are read once
    for path in sorted(_files(folder)):
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            key = (status.st_dev, status.st_ino)
            if key not in known:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = Entry(status.st_size, known[key])
    document = {
        "format": FORMAT, "version": VERSION, "run_id": run_id, "command": command,
        "inputs": dict(inputs),
        "files": {name: entry._asdict() for name, entry in files.items()},
    }  # fmt: skip
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for place, _, _ in os.walk(folder):
        sync_folder(Path(place))
    return Manifest(run_id, command, files, dict(inputs))


def read_manifest(folder: Path) -> Manifest | None:
    """A result's manifest.

    Args:
        folder: Of the result.

    Returns:
        None if there is none, as in what bergson wrote.

    Raises:
        CheckpointError: If there is one that can't be read, or is of a later version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}")
        if document["version"] > VERSION:
            raise ValueError(f"its version {document['version']} is later than {VERSION}")
        files = {str(name): Entry(int(each["size"]), str(each["sha256"]))
                 for name, each in document["files"].items()}  # fmt: skip
        inputs = {str(name): str(each) for name, each in document.get("inputs", {}).items()}
        return Manifest(str(document["run_id"]), str(document["command"]), files, inputs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no manifest of jhessians: {error or type(error).__name__}; compute the "
            "result again or get a whole copy"
        ) from None


def problems(folder: Path, manifest: Manifest, *, deep: bool) -> Iterator[str]:
    """What is wrong with a result.

    Args:
        folder: Of the result.
        manifest: Its own.
        deep: Whether contents are hashed, not only sizes compared.

    Yields:
        A line for every file that is missing, of another size or of other content, or that doesn't
        belong to it.
    """
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name, entry in manifest.files.items():
        path = found.pop(name, None)
        if path is None:
            yield f"{name} is missing"
            continue
        size = path.stat().st_size
        if size != entry.size:
            yield f"{name} has {size:,} bytes; expected {entry.size:,}"
        elif deep and _sha256(path) != entry.sha256:
            yield f"{name} has changed: its SHA-256 is not that of the manifest"
    for name in found:
        yield f"{name} isn't part of the result"


def sync_folder(folder: Path) -> None:
    """See to it that the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """See to it that a folder's files and their names, and those in folders below, are on the disk.

    Args:
        folder: Exists.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_folder(Path(place, name))
        sync_folder(Path(place))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Regular files, but for the manifest and what only a run in progress has."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if not name.startswith(".") and path != folder / MANIFEST:
                yield path
