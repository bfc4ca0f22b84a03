"""Input files are opened here: ordinary files only, so that nothing waits and nothing is consumed.

Opening a FIFO waits for a writer, reading a device may never end. All that is raised is `OSError`,
and `ValueError` for content that is no JSON or YAML; a reader says in its own words whose file it
was and what to do.
"""

import errno
import json
import os
import stat
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

_DEEPEST = 64  # brackets in brackets of a YAML file

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_ordinary(path: Path) -> os.stat_result:
    """Check that opening a path is safe; for those that another library opens.

    Args:
        path: Of a file or a folder; links are followed.

    Returns:
        Its status.

    Raises:
        OSError: If it doesn't exist, or is a FIFO, a socket or a device.
    """
    status = path.stat()
    _refuse_special(status, path)
    return status


def require_ordinary_files(folder: Path) -> None:
    """Check that opening anything in a folder, at any depth, is safe.

    Args:
        folder: Exists; links to folders are not followed.

    Raises:
        OSError: If something in it is a FIFO, a socket or a device.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if path.exists():  # a link that leads nowhere harms nobody who doesn't need it
                require_ordinary(path)


def open_input(path: Path, *, buffering: int = -1) -> BufferedReader:
    """Open an ordinary file to read.

    Args:
        path: Of the file.
        buffering: As in `open`.

    Returns:
        The open file, in binary mode; without a buffer it is a `FileIO`, which does all that a
            reader needs.

    Raises:
        OSError: If it can't be opened, or is no ordinary file.
    """
    require_ordinary(path)
    file: Any = open(path, "rb", buffering=buffering, opener=_at_once)
    try:
        _refuse_special(os.fstat(file.fileno()), path)  # it may be another one by now
    except OSError:
        file.close()
        raise
    return file


def read_text(path: Path) -> str:
    """A text file's content.

    Returns:
        The text, which is UTF-8 in the file.

    Raises:
        OSError: If it can't be read, or is no ordinary file.
        ValueError: If it isn't UTF-8.
    """
    with open_input(path) as file:
        return file.read().decode("utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Returns:
        Dicts, lists and plain values.

    Raises:
        OSError: If it can't be read, or is no ordinary file.
        ValueError: If it isn't JSON in UTF-8, or too large or too deep to be read.
    """
    return parse_json(read_text(path))


def parse_json(text: str | bytes, **how: Any) -> Any:
    """What JSON says.

    Args:
        text: In UTF-8, if it is bytes.
        **how: As in `json.loads`.

    Returns:
        Dicts, lists and plain values.

    Raises:
        ValueError: If it isn't JSON, or too large or too deep to be read.
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, **how)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; nothing in it is executed.

    Returns:
        Dicts, lists and plain values.

    Raises:
        OSError: If it can't be read, or is no ordinary file.
        ValueError: If it isn't YAML in UTF-8, or too deep to be read.
    """
    text = read_text(path)
    try:
        return _yaml_loader()(text).get_single_data()
    except Exception as error:  # values such as `!!int ""` bring out whatever their parser raises
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None


@cache
def _yaml_loader() -> Any:
    """PyYAML's safe loader with a bound on the depth of brackets: it takes the square of that."""
    import yaml

    class Loader(yaml.SafeLoader):
        def fetch_flow_collection_start(self, token: Any) -> None:
            if self.flow_level >= _DEEPEST:
                raise ValueError("it is nested too deep")
            super().fetch_flow_collection_start(token)

    return Loader


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _refuse_special(status: os.stat_result, path: Path) -> None:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is not None:
        raise OSError(errno.EINVAL, f"it is {kind}; expected an ordinary file", str(path))
