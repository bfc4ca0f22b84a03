"""What says that a folder is a finished result of ours: `manifest.json`, written last.

    {"format": "jhessians", "version": 1, "run_id": "6d0c…", "command": "compute",
     "inputs": {"the data set": "5e88…", …},
     "files": {"config.yaml": {"size": 812, "sha256": "9f86…"}, …}}

Only a folder with a manifest is ever replaced. `jhessians verify` compares sizes and hashes.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from jhessians.errors import CheckpointError, quoted, shown
from jhessians.files import open_input, read_json, require_ordinary

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
        with open_input(path) as file:
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
    try:
        document = read_json(path)
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {quoted(document['format'])}")
        if not _is_count(document["version"]) or document["version"] > VERSION:
            found = quoted(document["version"])
            raise ValueError(f"its version {found} is not 1 to {VERSION}")
        files = {_inside(name): _entry(each) for name, each in document["files"].items()}
        inputs = {_word(name): _word(each) for name, each in document.get("inputs", {}).items()}
        return Manifest(_word(document["run_id"]), _word(document["command"]), files, inputs)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else shown(str(error))
        raise CheckpointError(
            f"{path} is no manifest of jhessians: {reason or type(error).__name__}; compute the "
            "result again or get a whole copy"
        ) from None


def check_files(folder: Path, used: Callable[[str], bool]) -> Manifest | None:
    """Compare the sizes of files that a reader is about to use with the result's manifest.

    Args:
        folder: Of the result.
        used: Which files these are, by their paths below the folder.

    Returns:
        The manifest; None if there is none, as in what bergson wrote.

    Raises:
        CheckpointError: If a file is missing or has another size, or the manifest can't be read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    for name, entry in manifest.files.items():
        if used(name) and (problem := _misfit(folder / name, name, entry)):
            raise CheckpointError(
                f"{folder} is not what {shown(manifest.command)} wrote: {problem}; get a whole "
                "copy or make it again"
            )
    return manifest


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
    for name, entry in manifest.files.items():
        path = folder / name
        if problem := _misfit(path, name, entry):
            yield problem
        elif deep and (problem := _other_content(path, name, entry)):
            yield problem
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files:
            yield f"{shown(name)} isn't part of the result"


def _misfit(path: Path, name: str, entry: Entry) -> str | None:
    """What is wrong with a file that can be seen without reading it; None if nothing is."""
    try:
        status = require_ordinary(path)
    except (FileNotFoundError, NotADirectoryError):
        return f"{shown(name)} is missing"
    except OSError as error:
        return f"{shown(name)} cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{shown(name)} is a folder; expected a file"
    if status.st_size != entry.size:
        return f"{shown(name)} has {status.st_size:,} bytes; expected {entry.size:,}"
    return None


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


def _entry(value: Any) -> Entry:
    if not _is_count(value["size"]):
        raise ValueError(f"the size {quoted(value['size'])} is none")
    return Entry(value["size"], _word(value["sha256"]))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{quoted(value)} is no word")
    return value


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"the file {shown(name)} isn't inside of the result")
    return name


def _other_content(path: Path, name: str, entry: Entry) -> str | None:
    try:
        with open_input(path) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256:
                return None
    except OSError as error:
        return f"{shown(name)} cannot be read: {error.strerror}"
    return f"{shown(name)} has changed: its SHA-256 is not that of the manifest"


def _files(folder: Path) -> Iterator[Path]:
    """Regular files, but for the manifest and what only a run in progress has."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if not name.startswith(".") and path != folder / MANIFEST:
                yield path
