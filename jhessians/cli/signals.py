"""What SIGTERM, SIGHUP and Ctrl-C do: they unwind everything, at any moment.

Python hears of a signal when its main thread comes back from C++, which waits for other hosts as
long as these let it. So a thread hears of it, too, and ends the process if the main thread can't.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jhessians.devices import ending
from jhessians.fitting.grace import Terminated, ask, grace

HEARD = 2.0
"""Seconds in which the main thread hears of a signal, unless it is in C++."""

UNWINDING, AFTER_GRACE = 10.0, 4.0
"""Seconds in which everything is unwound, and those for it after a period of grace."""


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind everything as Ctrl-C does, so that no half result stays behind.

    Signals that are ignored, as under nohup, or that a caller handles, are left alone.
    """
    heard = threading.Event()

    def unwind(number: int, frame: FrameType | None) -> None:
        if _is_in_import(frame):
            again(number)
            return
        heard.set()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not ask(number):
            raise Terminated(number)

    def again(number: int) -> None:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    def on_lost(lost: sys.UnraisableHookArgs) -> None:
        # Of finalizers, garbage collection and weak references nothing that is raised gets out.
        if isinstance(lost.exc_value, KeyboardInterrupt):
            again(signal.SIGINT)
        elif isinstance(lost.exc_value, Terminated):
            again(lost.exc_value.number)
        else:
            hook(lost)

    before = {}
    if threading.current_thread() is threading.main_thread():
        ends = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
        before = {number: signal.getsignal(number) for number in ends if number is not None}
    ours = {
        number: handler
        for number, handler in before.items()
        if handler in (signal.SIG_DFL, signal.default_int_handler)
    }
    for number in ours:
        signal.signal(number, unwind)
    hook, sys.unraisablehook = sys.unraisablehook, on_lost
    try:
        with _heard_anyway(set(ours), heard):
            yield
    finally:
        if sys.unraisablehook is on_lost:  # after an error there may be one that has to stay
            sys.unraisablehook = hook
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextmanager
def _heard_anyway(numbers: set[int], heard: threading.Event) -> Iterator[None]:
    """End the process after one of these signals, if the block doesn't end by itself.

    Args:
        numbers: The signals'.
        heard: Set once the main thread has heard of it.

    Yields:
        Nothing.
    """
    if not numbers:
        yield
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)  # the system's handler writes to it, which must not wait
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    left = threading.Event()
    thread = threading.Thread(
        target=_end_if_unheard, args=(reading, numbers, heard, left), name="signals", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        writing.close()  # which ends the thread


def _end_if_unheard(
    reading: socket.socket, numbers: set[int], heard: threading.Event, left: threading.Event
) -> None:
    """What the thread does: wait for the first of the signals, then for the end."""
    number = next((each for data in iter(lambda: reading.recv(1), b"") for each in data
                   if each in numbers), None)  # fmt: skip
    if number is None:
        return
    end = time.monotonic() + UNWINDING
    if number != signal.SIGINT:
        end = max(end, time.monotonic() + grace() + AFTER_GRACE)
        if not heard.wait(HEARD) and not left.is_set():
            ask(number)  # a state may be whole in time, if the main thread comes back
    if not left.wait(max(0.0, end - time.monotonic())):
        code = 128 + number
        said = "interrupted" if number == signal.SIGINT else f"terminated by {Terminated(number)}"
        ending.end(said, code)


def _is_in_import(frame: FrameType | None) -> bool:
    """Whether a module is imported: what is raised then is taken for a sign that it isn't there."""
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load":
            return True
        frame = frame.f_back
    return False
