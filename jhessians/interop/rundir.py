"""A result appears whole under its final name, or not at all.

A run writes into `<path>.part`, which it holds (`jhessians.interop.hold`) and which is renamed to
`<path>` when it is finished and described (`jhessians.interop.manifest`). An earlier result under
that name is moved away just before and deleted just after, so an interrupted run loses nothing;
only what has a manifest is an earlier result.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from jhessians.errors import CheckpointError, ConfigError, OutputError, UserError
from jhessians.interop.hold import Hold, remove_leftover
from jhessians.interop.manifest import MANIFEST, read_manifest, sync_folder, write_manifest

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
    errno.EEXIST: ("another process has just begun there", "choose another path"),
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


def has_state(part: Path) -> bool:
    """Whether an unfinished result has a saved state, which a run can go on with.

    Args:
        part: Its folder.

    Returns:
        False also if there is no such folder, or it isn't ours.
    """
    found = [path for depth in ("*", "*/*", "*/*/*") for path in (part / STATE).glob(depth)]
    return not part.is_symlink() and any(
        path.name.isdigit() or path.suffix == ".done" for path in found
    )


def how_to_go_on(part: Path) -> str | None:
    """What to do with an unfinished result; None if there is nothing to go on with."""
    return f"pass `resume` to go on with what is saved in {part}" if has_state(part) else None


def require_apart(path: Path, inputs: Iterable[str | Path]) -> None:
    """Check that replacing a folder would destroy nothing that a run reads or stands on.

    Args:
        path: Of the folder.
        inputs: What the run reads, as far as that is files and folders.

    Raises:
        OutputError: If it is, contains or lies inside one of these, or is or contains the working
            directory, the home directory or the root.
    """
    path = Path(os.path.realpath(path))
    grounds = {"the working directory": Path.cwd(), "the home directory": Path.home()}
    for name, ground in grounds.items():
        if path in (ground := Path(os.path.realpath(ground)), *ground.parents):
            raise OutputError(f"{path} can't be replaced, since {name} {ground} would go with it; "
                              "choose another path")  # fmt: skip
    for each in inputs:
        place = Path(os.path.realpath(each))
        if path in (place, *place.parents) or place in path.parents:
            where = "is" if path == place else "contains" if path in place.parents else "is inside"
            raise OutputError(
                f"{path} can't be replaced: it {where} {each}, which the run reads; choose another "
                "path"
            )


STATE = ".state"
"""Folder of a growing result with what its run has saved (`jhessians.fitting.checkpoints`)."""


class RunDirectory:
    """Context manager for a run's output folder: `with RunDirectory(path) as part: ...`.

    Entering gives `<path>.part`, held by this process: empty, or what an unfinished run left there
    and this one continues. Leaving normally writes the manifest and renames it to `path`. Leaving
    by any exception, Ctrl-C included, leaves whatever is under `path` as it was, and removes
    `<path>.part` unless the run saved a state there (`STATE`).

    Args:
        path: Final name of the result.
        overwrite: Replace an earlier result, once the new one is complete, and discard what an
            unfinished run saved.
        command: What writes it, for the manifest.
        inputs: Paths that the run reads, which replacing must not touch.
        writer: False in all but one process of a multi-process run; such a process gets the
            same folder name and never touches the disk.
        resume: Go on with what an unfinished run saved, if there is something.

    Attributes:
        resumed: Whether there is.
        contents: What the run reads, such as "the data set" → a hash of it, for the manifest.

    Raises:
        OutputError: If `path` exists and `overwrite` is false, or it isn't an earlier result that
            may be replaced; if another process is writing it; if an unfinished run saved something
            there, and neither `overwrite` nor `resume` is true; if the disk is full, read-only or
            not ours to write to.
    """

    def __init__(
        self,
        path: str | Path,
        overwrite: bool = False,
        *,
        command: str,
        inputs: Iterable[str | Path] = (),
        writer: bool = True,
        resume: bool = False,
    ):
        # An absolute name stays right when the run changes its working directory.
        self.path = Path(os.path.abspath(path))
        if not self.path.name:
            raise OutputError(f"cannot write {path}: expected a folder's name; give a new folder")
        self.part = self.path.with_name(self.path.name + ".part")
        self.overwrite, self.command, self.writer = overwrite, command, writer
        self.resume, self.resumed = resume, False
        self.contents: dict[str, str] = {}
        self._inputs = [Path(os.path.abspath(each)) for each in inputs]
        self._hold: Hold | None = None
        self._keep_part = False

    @property
    def run_id(self) -> str:
        """Random, of this run."""
        assert self._hold is not None
        return self._hold.holder.run_id

    def __enter__(self) -> Path:
        if not self.writer:
            return self.part
        try:
            self._check_free()
            if os.path.lexists(self.part):
                self._take_leftover()
            if not self.resumed:
                self.part.mkdir(parents=True)
                try:
                    self._hold = Hold(self.part)
                except BaseException:  # unmarked, nobody would know whose it is
                    shutil.rmtree(self.part, ignore_errors=True)
                    raise
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
            if error is not None and not isinstance(error, UserError):  # those the writer has, too
                self._advise(error)
            return
        assert self._hold is not None
        published = None
        try:
            if error is None:
                self._describe()
                self._publish()
                published = self.path
                shutil.rmtree(self.path / STATE, ignore_errors=True)
        finally:
            if published is None:
                self._leave(error)
            # A finished result without its name is nobody's leftover.
            finished = self.part if self._keep_part and not has_state(self.part) else None
            self._hold.release(unmark=published or finished)
        if isinstance(error, OSError) and self._is_ours(error):
            said = output_error(error, self.path)
            for note in getattr(error, "__notes__", ()):
                said.add_note(note)
            raise said from error

    def _take_leftover(self) -> None:
        """Continue or remove what an unfinished run left."""
        if has_state(self.part) and self.resume:
            self._hold, self.resumed = Hold(self.part, goes_on=True), True
        elif has_state(self.part) and not self.overwrite:
            raise OutputError(
                f"{self.part} holds what an unfinished run has saved; pass `resume` to go on with "
                "it, `overwrite` to begin anew, or choose another path"
            )
        else:
            remove_leftover(self.part)

    def _leave(self, error: BaseException | None) -> None:
        """Remove an unfinished result, unless a run can go on with it."""
        if has_state(self.part):
            if error is not None and not isinstance(error, ConfigError):
                self._advise(error)
        elif not self._keep_part:
            shutil.rmtree(self.part, ignore_errors=True)

    def _advise(self, error: BaseException) -> None:
        if advice := how_to_go_on(self.part):
            error.add_note(advice)

    def _check_free(self) -> None:
        path = self.path
        if not os.path.lexists(path):
            return
        if path.is_symlink() or not path.is_dir():
            what = "a link" if path.is_symlink() else "a file" if path.is_file() else "no folder"
            raise OutputError(
                f"{path} is {what}; expected a folder or nothing; choose another path"
            )
        if not self.overwrite:
            raise OutputError(
                f"{path} exists already; expected a new path; "
                "pass `overwrite` to replace it or choose another path"
            )
        require_apart(path, self._inputs)
        try:
            found = read_manifest(path)
        except CheckpointError as error:
            raise OutputError(str(error)) from None
        if found is None:
            raise OutputError(
                f"{path} has no {MANIFEST}, by which a finished result of jhessians is known, and "
                "nothing else is replaced; choose another path or move it away"
            )

    def _describe(self) -> None:
        try:
            write_manifest(
                self.part, run_id=self.run_id, command=self.command, inputs=self.contents
            )
        except OSError as error:
            raise output_error(error, self.path) from error

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
            sync_folder(self.path.parent)
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
            shutil.rmtree(parking, ignore_errors=True)
