"""One run per path: the folder in which a result grows is held by one living process.

The holder locks `.run.json` in that folder (flock, which ends with the process) and touches it
every few seconds. Where locks are not supported, or the holder is on another host, the file's age
counts.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from jhessians.errors import OutputError

MARK = ".run.json"
"""Marks a folder as ours to delete, and names its holder."""

HEARTBEAT, EXPIRED = 10.0, 60.0
"""Seconds between two touches, and after how many without one a holder counts as dead."""

_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """Who works in a folder.

    Attributes:
        run_id: Random, also that of the result.
        host: Its computer's name.
        process: Its number there.
        since: When it began, in local time.
    """

    run_id: str
    host: str
    process: int
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class Hold:
    """Holds a folder until `release`, or until the process ends.

    Args:
        folder: Exists.
        goes_on: Whether a dead run of ours left it, which this one continues under its run id;
            otherwise nobody else has it.

    Attributes:
        holder: This process.

    Raises:
        OutputError: If a folder to go on with isn't what a run of ours left, or a living one holds
            it.
        OSError: If the mark can't be written.
    """

    def __init__(self, folder: Path, *, goes_on: bool = False):
        self._path = folder / MARK
        if goes_on:
            self._file, before = _take(folder)
            run_id = before.run_id if before else uuid.uuid4().hex
        else:
            self._file, run_id = self._path.open("x", encoding="utf-8"), uuid.uuid4().hex
            _lock(self._file.fileno())
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.holder = Holder(run_id, socket.gethostname(), os.getpid(), since)
        self._file.seek(0)
        self._file.write(json.dumps(asdict(self.holder)) + "\n")
        self._file.truncate()
        self._file.flush()
        self._ended = threading.Event()
        threading.Thread(target=self._touch, daemon=True).start()

    def release(self, *, unmark: Path | None = None) -> None:
        """Let go of the folder; nothing happens the second time.

        Args:
            unmark: Where the folder now is, to remove the mark from it; None to leave it.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        if unmark is not None and _is_still(unmark / MARK, self._file.fileno()):
            (unmark / MARK).unlink()
        self._file.close()

    def _touch(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                os.utime(self._file.fileno())
            except (OSError, ValueError):  # it is gone, or was closed just now
                return


def marked_run_id(folder: Path) -> str | None:
    """The run that a folder's mark names; None without a mark, as outside of a run."""
    try:
        return Holder(**json.loads((folder / MARK).read_text(encoding="utf-8"))).run_id
    except (OSError, ValueError, TypeError):
        return None


def remove_leftover(folder: Path) -> None:
    """Delete what a dead run of ours left behind; nothing else.

    Args:
        folder: Exists.

    Raises:
        OutputError: If it isn't a folder that a run of ours made, or a living one holds it.
        OSError: If it can't be deleted.
    """
    file, _ = _take(folder)
    with file:
        # Under another name before the lock ends: somebody else may be about to do the same.
        removed = folder.with_name(f"{folder.name}.removed-{uuid.uuid4().hex[:8]}")
        os.rename(folder, removed)
    shutil.rmtree(removed)


def _take(folder: Path) -> tuple[TextIO, Holder | None]:
    """Lock what a dead run of ours left behind.

    Returns:
        Its open mark, and who that was if known.

    Raises:
        OutputError: If it isn't a folder that a run of ours made, or a living one holds it.
    """
    path = folder / MARK
    if folder.is_symlink() or not folder.is_dir() or path.is_symlink() or not path.is_file():
        raise OutputError(
            f"{folder} stands where the result would grow, and isn't what an unfinished run left "
            "there; move it away or choose another path"
        )
    with ExitStack() as stack:
        file = stack.enter_context(path.open("r+", encoding="utf-8"))
        try:
            holder = Holder(**json.loads(file.read()))
        except (ValueError, TypeError):
            holder = None  # it died before it had written who it was, or is about to
        locked = _lock(file.fileno())
        elsewhere = holder is None or holder.host != socket.gethostname()
        recent = (elsewhere or locked is None) and _age(folder, path) < EXPIRED
        if locked is False or recent or not _is_still(path, file.fileno()):
            raise OutputError(
                f"{folder} is being written by {holder or 'a process that has just begun'}; wait "
                "for it, stop it, or choose another path"
            )
        stack.pop_all()
    return file, holder


def _lock(handle: int) -> bool | None:
    """Lock a file for this process, if nobody else has; None where locks are not supported."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


def _is_still(path: Path, handle: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _age(folder: Path, path: Path) -> float:
    """Seconds since a file was touched, by the clock of its own file system."""
    probe = folder / f"{MARK}.{uuid.uuid4().hex[:8]}"
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()
