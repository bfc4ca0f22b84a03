"""Where this process is in its work, and whether it moves, for the other hosts to know.

Work moves when a stage begins, a batch is taken or something is counted as done; and also when the
processors work or files are read, as while XLA compiles or weights come from a slow disk. Whoever
waits for others doesn't move: on accelerators a thread that waits keeps a processor busy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BUSY = 0.1
"""Processors' seconds a second from which a process works; one that hangs takes a hundredth."""

READ = 1 << 16
"""Bytes a look that files are read or written by, beyond what looking takes."""


@dataclass(frozen=True)
class Place:
    """Where a process is.

    Attributes:
        stage: Of the run.
        batch: The last one that was taken; None before the stage's first.
        moves: Grows whenever something moves.
        waits: Whether it waits for the others.
    """

    stage: str
    batch: int | None
    moves: int
    waits: bool

    def __str__(self) -> str:
        batch = "" if self.batch is None else f", batch {self.batch}"
        return f"{self.stage}{batch}"


class _Here:
    def __init__(self) -> None:
        self.stage, self.batch, self.moves = "the beginning", None, 0
        self.waits, self.computes = 0, False

    stage: str
    batch: int | None


_here = _Here()


def enter(stage: str) -> None:
    """A stage of the run begins.

    Args:
        stage: As people are shown it.
    """
    _here.stage, _here.batch = stage, None
    _here.moves += 1


def move(batch: int | None = None) -> None:
    """Something is done.

    Args:
        batch: The number of the batch that is taken now, from 0; None if it isn't about batches.
    """
    if batch is not None:
        _here.batch = batch
    _here.moves += 1


@contextmanager
def waiting(*, computes: bool = False) -> Iterator[None]:
    """The block waits for all hosts.

    Args:
        computes: Whether this host's processors compute meanwhile what is waited for, as where they
            are the devices.

    Yields:
        Nothing.
    """
    _here.waits += 1
    before, _here.computes = _here.computes, computes
    try:
        yield
    finally:
        _here.computes = before
        _here.waits -= 1
        _here.moves += 1


class Watcher:
    """Looks now and then at where this process is and whether it has worked in between."""

    def __init__(self) -> None:
        self._worked, self._looked = 0, time.monotonic()
        self._seconds, self._bytes = time.process_time(), _bytes_moved()

    def look(self) -> Place:
        """Where this process is now."""
        now, seconds, count = time.monotonic(), time.process_time(), _bytes_moved()
        busy = seconds - self._seconds > BUSY * (now - self._looked)
        waits = _here.waits > 0
        if (busy or count - self._bytes > READ) and (not waits or _here.computes):
            self._worked += 1
        self._looked, self._seconds, self._bytes = now, seconds, count
        return Place(_here.stage, _here.batch, _here.moves + self._worked, waits)


def _bytes_moved() -> int:
    """Bytes that this process has read and written so far, as far as the system says."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) for line in lines if not line.startswith("sys"))
    return 0
