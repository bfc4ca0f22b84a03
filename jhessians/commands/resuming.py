"""What a command saves while it runs, and what of an unfinished run it goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jhessians.capture.problem import Problem
from jhessians.commands.hosts import require_shared
from jhessians.config.fingerprint import BY_CONTENT, NOT_NUMBERS, Fingerprint
from jhessians.config.replay import DATA
from jhessians.data.batching import Batch
from jhessians.devices.ending import advise
from jhessians.devices.hosts import most_of_hosts, together
from jhessians.errors import ConfigError
from jhessians.fitting.checkpoints import Checkpoints, SavedCheckpoints
from jhessians.fitting.grace import saving
from jhessians.fitting.hushed import hushed
from jhessians.interop.manifest import read_manifest
from jhessians.interop.rundir import STATE, RunDirectory, how_to_go_on
from jhessians.report.progress import Progress

FINGERPRINT = "fingerprint.json"


class Resuming:
    """A run's saved state, of which a fingerprint says what run it is of.

    Args:
        config: The command's options, those of saving among them.
        directory: Where it writes, entered.
        mesh: The devices.
        progress: Is told what is continued.

    Attributes:
        checkpoints: Where the state is saved.
        devices: Over how many devices the documents of a batch are divided.

    Raises:
        ConfigError: If an unfinished run can't be continued by this one.
    """

    def __init__(self, config: Any, directory: RunDirectory, mesh: Mesh, progress: Progress):
        self.checkpoints, self.devices = Checkpoints(), mesh.size
        self._directory, self._folder = directory, directory.part / STATE
        self._given, self._warn = config.resolved_dict(), progress.warn
        self._earlier: Fingerprint | None = None
        advise(lambda: progress.reword(how_to_go_on(directory.part) or ""))
        resumed = bool(most_of_hosts(int(directory.resumed)))
        if config.resume and not resumed:
            progress.note("No unfinished run has saved anything here: this one begins anew")
        if resumed:
            with together():
                self._earlier = Fingerprint.read(self._folder / FINGERPRINT)
                if difference := self._earlier.difference(self._given):
                    raise ConfigError(
                        f"{directory.part} is an unfinished run of other options: {difference}; "
                        "give the same, or pass `overwrite` instead of `resume` to begin anew"
                    )
                self._take_devices(self._earlier.devices, mesh, progress)
        elif not config.checkpoint_minutes:
            return
        with together():
            if jax.process_index() == 0:
                self._folder.mkdir(exist_ok=True)
        require_shared(directory.part, ", or `checkpoint_minutes` 0, which saves no state")
        self.checkpoints = SavedCheckpoints(
            self._folder, minutes=config.checkpoint_minutes or float("inf"),
            note=progress.note, warn=progress.warn,
        )  # fmt: skip

    @property
    def resumed(self) -> bool:
        """Whether an unfinished run is continued."""
        return self._earlier is not None

    def taken_up(self, config: Any) -> Any:
        """The options with those settled that an unfinished run had settled.

        Args:
            config: As they were given.

        Returns:
            A config; of the same values if nothing is continued.
        """
        if self._earlier is None:
            return config
        leave = NOT_NUMBERS | BY_CONTENT
        settled = {k: v for k, v in self._earlier.settled.items() if k not in leave}
        return replace(config, **settled)

    def begin(self, config: Any, contents: Mapping[str, str], replayed: Mapping[str, str]) -> None:
        """Note what the run is, before anything of it is saved.

        Args:
            config: The options, all of them settled.
            contents: What is read, such as "the data set" → a hash of it.
            replayed: The same of the run whose options are replayed; empty if none are.

        Raises:
            ConfigError: If an unfinished run read something else.
        """
        self._directory.contents = dict(contents)
        if changed := [name for name, value in replayed.items()
                       if name in contents and contents[name] != value]:  # fmt: skip
            self._warn(f"{' and '.join(changed)} changed since the run that is replayed")
        if self._earlier is not None:
            if name := self._earlier.changed(contents):
                raise ConfigError(
                    f"{self._directory.part} is an unfinished run, and {name} changed since; pass "
                    "`overwrite` instead of `resume` to begin anew"
                )
        elif jax.process_index() == 0 and self._folder.is_dir():
            found = Fingerprint(self._given, config.resolved_dict(), contents, self.devices)
            found.write(self._folder / FINGERPRINT)

    def _take_devices(self, devices: int, mesh: Mesh, progress: Progress) -> None:
        """Divide batches as the unfinished run did, if that can be done here."""
        if devices % mesh.size:
            raise ConfigError(
                f"{self._directory.part} was begun on {devices} devices, of which "
                f"{mesh.size} is no divisor: resume on {devices}, or on "
                f"{' or '.join(str(n) for n in range(devices - 1, 0, -1) if devices % n == 0)}"
            )
        if devices != mesh.size:
            progress.note(
                f"Begun on {devices} devices, continued on {mesh.size}: the result is that of an "
                "uninterrupted run up to the rounding of sums, not bit for bit"
            )
        self.devices = devices


@contextmanager
def resuming(
    config: Any, directory: RunDirectory, mesh: Mesh, progress: Progress
) -> Iterator[Resuming]:
    """A run's saved state, all of which is on the disk when the block is left.

    Arguments and errors are those of `Resuming`.

    Yields:
        The state.
    """
    found = Resuming(config, directory, mesh, progress)
    with ExitStack() as stack:
        if config.checkpoint_minutes:
            stack.enter_context(saving(config.grace_seconds))
        stack.enter_context(hushed())
        stack.callback(found.checkpoints.settle)
        yield found


def contents_of(documents: str, weights: str, optimizer_state: str | None = None) -> dict[str, str]:
    """What a run reads, by hashes.

    Args:
        documents: Of the data set.
        weights: Of the model.
        optimizer_state: A file or folder; None for none.

    Returns:
        Words → hash, or sizes and times of an optimizer's files, which may be large.
    """
    contents = {DATA: documents, "the model's weights": weights}
    if optimizer_state is not None:
        contents["the optimizer's state"] = version_of(Path(optimizer_state))
    return contents


def positions_of(problem: Problem, batches: Iterable[Batch]) -> int:
    """About how many positions of some batches count, on all hosts; these batches are taken."""
    masks = [problem.mask(batch) for batch in batches]
    return problem.hosts * sum(int(mask.sum()) for mask in masks if mask is not None)


def version_of(path: Path) -> str:
    """What changes when something too large to be hashed does.

    Args:
        path: Of a file or a folder.

    Returns:
        The run that wrote the folder, if it says so; otherwise its files' sizes and times.
    """
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest is not None:
        return manifest.run_id
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(each.relative_to(path)), each.stat()) for each in files if each.is_file()]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
