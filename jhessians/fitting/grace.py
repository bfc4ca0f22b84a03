"""A run that is asked to end, as preempted machines ask with SIGTERM, first saves what it has.

The signal's handler calls `ask`. Inside `saving` the request waits until the run comes to a point
where its state is whole, looks at `asked`, saves and raises `Terminated`; but no longer than the
period of grace.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Terminated(BaseException):
    """A signal asked the process to end; it unwinds everything, as KeyboardInterrupt does.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number


@dataclass
class _Grace:
    seconds: float | None = None
    asked: int | None = None
    timer: threading.Timer | None = None


_grace = _Grace()


@contextmanager
def saving(seconds: float) -> Iterator[None]:
    """Let requests to end wait, inside the block, for the run to save its state.

    Args:
        seconds: The period of grace, after which the run ends wherever it is; 0 for none.

    Yields:
        Nothing.
    """
    before = _grace.seconds
    _grace.seconds = seconds or None
    try:
        yield
    finally:
        _grace.seconds = before
        if _grace.timer is not None:
            _grace.timer.cancel()
        _grace.asked = _grace.timer = None


@contextmanager
def at_once() -> Iterator[None]:
    """Let requests end the block at once: it waits for something, and the state is whole."""
    before = _grace.seconds
    _grace.seconds = None
    try:
        yield
    finally:
        _grace.seconds = before


def ask(number: int) -> bool:
    """Ask the run to end; for a signal's handler.

    Args:
        number: The signal's.

    Returns:
        Whether the request waits. If not, which is always so the second time, the run must end now.
    """
    if _grace.seconds is None or _grace.asked is not None:
        return False
    _grace.asked = number
    _grace.timer = threading.Timer(_grace.seconds, os.kill, (os.getpid(), number))
    _grace.timer.daemon = True
    _grace.timer.start()
    return True


def grace() -> float:
    """Seconds that a request to end may wait; 0 if it must not."""
    return _grace.seconds or 0.0


def asked() -> int | None:
    """The number of the signal that asked the run to end, if one did."""
    return _grace.asked
