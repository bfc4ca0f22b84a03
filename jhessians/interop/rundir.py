"""A result appears whole under its final name, or not at all.

A run writes into `<path>.part`, which is renamed to `<path>` when it is finished. An earlier result
under that name is moved away just before and deleted just after, so an interrupted run loses
nothing.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from jhessians.errors import OutputError

# What the operating system says, and what its user can do about it.
_REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another disk"),
    errno.EFBIG: ("a file grew beyond the limit", "use more shards or raise the limit"),
    errno.EACCES: ("permission denied", "choose a folder that you may write to"),
    errno.EPERM: ("operation not permitted", "choose a folder that you may write to"),
    errno.EROFS: ("the file system is read-only", "choose another disk"),
    errno.ENOTDIR: ("a part of the path is a file", "choose a path made of folders"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EIO: ("the disk reported an error", "check it or choose another disk"),
    errno.EBUSY: ("the folder is in use", "choose another path"),
}
# Errors of writing bytes, which name no file.
_WHILE_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def output_error(error: OSError, path: Path) -> OutputError:
    """One line for a failed write to `path`: what happened and what to do."""
    number = error.errno if error.errno is not None else -1
    cause, remedy = _REMEDIES.get(
        number, (error.strerror or str(error), "check the path and try again")
    )
    return OutputError(f"cannot write {path}: {cause}; {remedy}")


class RunDirectory:
    """Context manager for a run's output folder: `with RunDirectory(path) as part: ...`.

    Entering gives `<path>.part`, empty; a leftover of an earlier run is removed. Leaving
    normally renames it to `path`. Leaving by any exception, Ctrl-C included, removes it and
    leaves whatever is under `path` as it was.

    Args:
        path: Final name of the result.
        overwrite: Replace an existing folder, once the new one is complete.
        writer: False in all but one process of a multi-process run; such a process gets the
            same folder name and never touches the disk.

    Raises:
        OutputError: If `path` exists and `overwrite` is false, or is a file, or the disk is
            full, read-only or not ours to write to.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, *, writer: bool = True):
        # An absolute name stays right when the run changes its working directory.
        self.path = Path(os.path.abspath(path))
        if not self.path.name:
            raise OutputError(f"cannot write {path}: expected a folder's name; give a new folder")
        self.part = self.path.with_name(self.path.name + ".part")
        self.overwrite = overwrite
        self.writer = writer
        self._keep_part = False

    def __enter__(self) -> Path:
        if not self.writer:
            return self.part
        try:
            self._check_free()
            _remove(self.part)
            self.part.mkdir(parents=True)
        except OSError as error:
            raise output_error(error, self.path) from error
        return self.part

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.writer:
            return
        try:
            if error is None:
                self._publish()
        finally:
            if not self._keep_part:
                shutil.rmtree(self.part, ignore_errors=True)
        if isinstance(error, OSError) and self._is_ours(error):
            raise output_error(error, self.path) from error

    def _check_free(self) -> None:
        if not os.path.lexists(self.path):
            return
        if self.path.is_file():
            raise OutputError(
                f"{self.path} is a file; expected a folder or nothing; choose another path"
            )
        if not self.overwrite:
            raise OutputError(
                f"{self.path} exists already; expected a new path; "
                "pass `overwrite` to replace it or choose another path"
            )

    def _is_ours(self, error: OSError) -> bool:
        """Whether the error came from writing here, not from reading somebody's data."""
        if not isinstance(error.filename, str | bytes | os.PathLike):
            return error.errno in _WHILE_WRITING
        return self.part in Path(os.path.abspath(os.fsdecode(error.filename))).parents

    def _publish(self) -> None:
        """Rename `.part` to the final name, with what stood there parked meanwhile."""
        parking: Path | None = None
        try:
            self._check_free()
            if os.path.lexists(self.path):
                prefix = f"{self.path.name}.replaced-"
                parking = Path(tempfile.mkdtemp(prefix=prefix, dir=self.path.parent))
                os.rename(self.path, parking / self.path.name)
            # os.rename never moves a folder into another one, as shutil.move would.
            os.rename(self.part, self.path)
        except BaseException as error:
            if parking is not None:
                if not os.path.lexists(self.path):
                    os.rename(parking / self.path.name, self.path)
                with contextlib.suppress(OSError):
                    parking.rmdir()
            if isinstance(error, (OSError, OutputError)):
                # The numbers took hours and are complete: only their name is in the way.
                self._keep_part = True
                cause = output_error(error, self.path) if isinstance(error, OSError) else error
                raise OutputError(f"{cause} (the finished result is in {self.part})") from error
            raise
        if parking is not None:
            # The new result stands; failing to delete the old one must not fail the run.
            _remove(parking / self.path.name, ignore_errors=True)
            shutil.rmtree(parking, ignore_errors=True)


def _remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a folder, file or symbolic link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if not ignore_errors:
            raise
