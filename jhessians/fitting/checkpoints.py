"""What a fit has computed so far, saved through Orbax so that it can go on after any end.

    .state/covariances/<n>        running sums, with how many batches are in them
    .state/eigenbases/<n>         eigenpairs, with how many matrices they are of
    .state/correction/<n>         running sums

A series has the last two states of one stage. Orbax writes each while the run goes on, every host
its own part, under a temporary name until it is whole.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jhessians.devices.hosts import most_of_hosts
from jhessians.fitting.grace import Terminated, asked
from jhessians.interop.manifest import sync_folder, sync_tree
from jhessians.typing import PyTree

SHORT = 1 / 50
"""Of the time between two saves: a stage that took less, and whose next one will, isn't saved."""


KEPT = 2
"""States of a series: while one is written, or if it can't be read, there is the one before."""


class Saved(NamedTuple):
    """A state that a stage can go on from.

    Attributes:
        position: How far it had come, in plain numbers and texts.
        arrays: What it had computed.
    """

    position: dict[str, Any]
    arrays: PyTree[Any]


class Series:
    """The saved states of one stage; this one keeps nothing, for fits that can't be continued.

    Attributes:
        ended: Whether the state that the stage ends with is among them.
    """

    ended = False

    def load(self, like: Callable[[Mapping[str, Any]], PyTree[Any]]) -> Saved | None:
        """The latest state.

        Args:
            like: Position → what the arrays look like: `jax.ShapeDtypeStruct` for one on the
                devices, with its sharding if there is a mesh; a numpy dtype for one on the host.
                A shape may differ from the saved one in rows of padding.

        Returns:
            None if there is none.
        """
        return None

    def due(self) -> bool:
        """Whether to save now; with several hosts, all of them ask at the same point."""
        return False

    def save(self, position: Mapping[str, Any], arrays: PyTree[Any]) -> None:
        """Save a state, while the caller goes on.

        Args:
            position: How far the stage has come.
            arrays: What it has computed; all of it is finite, and won't be written to. It may be
                donated.

        Raises:
            Terminated: When all is saved, if somebody asked the run to end.
        """

    def finish(self, position: Mapping[str, Any], arrays: PyTree[Any]) -> None:
        """Save the state that the stage ends with, unless doing all again takes less time.

        Args:
            position: As in `save`.
            arrays: As in `save`.

        Raises:
            Terminated: As in `save`.
        """


class Checkpoints:
    """All series of a fit; these keep nothing."""

    def series(self, name: str, *, replaces: str | None = None, ahead: float = 0.0) -> Series:
        """The states of one stage.

        Args:
            name: The stage's.
            replaces: The series that nobody needs once this stage has ended.
            ahead: Seconds, about, that the stage's last state will be needed for.

        Returns:
            The series, of which there may be states of an earlier run.
        """
        return Series()

    def within(self, name: str) -> Checkpoints:
        """The series of a part of the fit, which has stages of its own."""
        return self

    def settle(self) -> None:
        """Wait until all that is being saved is on the disk."""

    @property
    def done(self) -> bool:
        """Whether this part of the fit is done, its results exported."""
        return False

    def finish(self) -> None:
        """Note that this part of the fit is done; its states are deleted."""


class SavedCheckpoints(Checkpoints):
    """All series of a fit, in a folder.

    Args:
        folder: Theirs; with several hosts, all of them see it.
        minutes: Between two saves.
        note: Is told of what is continued.
        warn: Is told of states that can't be saved or read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        minutes: float,
        note: Callable[[str], None],
        warn: Callable[[str], None],
        clock: _Clock | None = None,
    ):
        self.folder, self.minutes, self.note, self.warn = folder, minutes, note, warn
        self.clock = clock or _Clock()

    def series(self, name: str, *, replaces: str | None = None, ahead: float = 0.0) -> Series:
        """The states of one stage; see `Checkpoints.series`."""
        return SavedSeries(self, name, replaces=replaces, ahead=ahead)

    def within(self, name: str) -> Checkpoints:
        """The series of a part of the fit, in a folder of their own."""
        return SavedCheckpoints(
            self.folder / name,
            minutes=self.minutes, note=self.note, warn=self.warn, clock=self.clock,
        )  # fmt: skip

    def settle(self) -> None:
        """Wait until all that is being saved is on the disk."""
        self.clock.settle(self.warn)

    @property
    def done(self) -> bool:
        """Whether this part of the fit is done, its results exported."""
        return self._mark.exists()

    def finish(self) -> None:
        """Note that this part of the fit is done; its states are deleted."""
        self.settle()
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._mark.touch()
            sync_folder(self._mark.parent)
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _mark(self) -> Path:
        return self.folder.with_name(self.folder.name + ".done")


class _Clock:
    """When the run last saved, and what of that is still being written."""

    def __init__(self) -> None:
        self.saved = time.monotonic()
        self.writing: SavedSeries | None = None
        self.obsolete: Path | None = None

    def settle(self, warn: Callable[[str], None]) -> bool:
        """Wait until the last state is on the disk, then delete what it replaces."""
        series, self.writing = self.writing, None
        obsolete, self.obsolete = self.obsolete, None
        if series is None:
            return True
        try:
            series.manager.wait_until_finished()
        except Exception as error:  # a fit goes on without, whatever Orbax meets
            warn(f"the run's state can't be saved: {_in_a_line(error)}; the run goes on")
            return False
        if jax.process_index() == 0:
            sync_tree(series.folder)
            if obsolete is not None:
                shutil.rmtree(obsolete, ignore_errors=True)
        return True


class SavedSeries(Series):
    """The last two states of one stage, in a folder of its own.

    Args:
        run: Whose stage it is.
        name: The stage's.
        replaces: See `Checkpoints.series`.
        ahead: See there.
    """

    def __init__(self, run: SavedCheckpoints, name: str, *, replaces: str | None, ahead: float):
        self.run, self.folder = run, run.folder / name
        self._replaces = None if replaces is None else run.folder / replaces
        self._ahead, self._manager = ahead, None
        self._latest: Mapping[str, Any] | None = None

    @property
    def manager(self) -> Any:
        """Orbax's, made when it is needed."""
        if self._manager is None:
            import orbax.checkpoint as ocp

            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT, cleanup_tmp_directories=True
                ),
                item_handlers={
                    "position": ocp.JsonCheckpointHandler(),
                    "arrays": ocp.PyTreeCheckpointHandler(use_compression=False),
                },
            )
        return self._manager

    def load(self, like: Callable[[Mapping[str, Any]], PyTree[Any]]) -> Saved | None:
        """The latest state that can be read; see `Series.load`."""
        import orbax.checkpoint as ocp

        if not self.folder.is_dir():
            return None
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                only = ocp.args.Composite(position=ocp.args.JsonRestore())
                position = self.manager.restore(step, args=only).position
                wanted = like(position)
                flat = _flat(wanted)
                arrays = ocp.args.PyTreeRestore(
                    item=flat, restore_args=jax.tree.map(_restore_args, flat)
                )
                found = self.manager.restore(step, args=ocp.args.Composite(arrays=arrays))
            except Exception as error:  # the state before it may be whole
                self.run.warn(f"a saved state can't be read: {_in_a_line(error)}")
                continue
            words = ", ".join(f"{value} {name}" for name, value in position.items()
                              if isinstance(value, int))  # fmt: skip
            self.run.note(f"Continues from what was saved of {self.folder.name}: {words}")
            self._latest = position
            leaves = [found.arrays[key] for key in flat]
            return Saved(position, jax.tree.unflatten(jax.tree.structure(wanted), leaves))
        return None

    def due(self) -> bool:
        """Whether somebody asked the run to end, or it is time; all hosts get the same answer."""
        since = time.monotonic() - self.run.clock.saved
        return bool(most_of_hosts(int(asked() or since >= 60 * self.run.minutes)))

    def save(self, position: Mapping[str, Any], arrays: PyTree[Any]) -> None:
        """Save a state, while the caller goes on; see `Series.save`."""
        self._write(position, arrays)

    def finish(self, position: Mapping[str, Any], arrays: PyTree[Any]) -> None:
        """Save the state that the stage ends with; see `Series.finish`."""
        if position == self._latest:
            self.ended = True
            return
        since = self._ahead + time.monotonic() - self.run.clock.saved
        wanted = asked() or since >= SHORT * 60 * self.run.minutes
        if most_of_hosts(int(bool(wanted))):
            self.ended = True
            self._write(position, arrays)

    def _write(self, position: Mapping[str, Any], arrays: PyTree[Any]) -> None:
        import orbax.checkpoint as ocp

        clock = self.run.clock
        clock.settle(self.run.warn)
        step = 1 + (self.manager.latest_step() or 0)
        items = ocp.args.Composite(
            position=ocp.args.JsonSave(dict(position)), arrays=ocp.args.PyTreeSave(_flat(arrays))
        )
        try:
            self.manager.save(step, args=items)
            clock.writing, self._latest = self, position
            clock.obsolete = self._replaces if self.ended else None
        except Exception as error:
            with suppress(Exception):  # of what it has begun, nothing goes on
                self.manager.wait_until_finished()
            self.run.warn(f"the run's state can't be saved: {_in_a_line(error)}; the run goes on")
        clock.saved = time.monotonic()
        number = most_of_hosts(asked() or 0)
        if number:
            clock.settle(self.run.warn)
            raise Terminated(number)


def _flat(tree: PyTree[Any]) -> dict[str, Any]:
    """Leaves by number: Orbax would make paths of names."""
    return {f"{number:06}": leaf for number, leaf in enumerate(jax.tree.leaves(tree))}


def _restore_args(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    if isinstance(leaf, np.dtype):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # Not strict: rows of padding come and go with the number of devices.
    return ocp.ArrayRestoreArgs(
        sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False
    )


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
