"""How a process of several hosts ends when it can't go on: with one line, and nobody else's.

When another process is gone, C++ threads of JAX write a page to standard error and abort. So what
they write there passes through a thread here that keeps back what says the same as our line, and an
abort waits for a moment, in which the line is written.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_TRACE = re.compile(
    rb"^(\*\*\* Check failure stack trace|    @ +0x|Additional GRPC error information|:UNKNOWN:"
    rb"|RPC: /xla|absl::Status: |terminate called after throwing an instance of 'std::bad_cast'"
    rb"|  what\(\):  std::bad_cast"
    rb"|[DIWEF]\d{4} [\d:.]+ +\d+ (coordination|client\.h|distributed|service\.cc|pjrt_client)"
    rb"|\[Gloo\]|WARNING: All log messages before absl)"
)
"""Lines of C++ that tell of a process that is gone."""

_FATAL = b"Terminating process because the JAX distributed service"

LATER = 4.0
"""Seconds after that, and before the abort, in which others may know more of it."""


class _Ending:
    """What is known of this process's own end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.quiet = False
        self.filtered: int | None = None  # where standard error went before it was filtered
        self.advice: Callable[[], str] = lambda: ""
        self.reword: Callable[[str], str] = lambda line: line


_ending = _Ending()


def advise(advice: Callable[[], str]) -> None:
    """Say in the line with which this process ends what to do.

    Args:
        advice: Gives a clause, empty if there is nothing to do.
    """
    _ending.advice = advice


def reword(change: Callable[[str], str]) -> None:
    """Change the line with which this process ends, such as to make flags of options' names.

    Args:
        change: Takes the line and gives another.
    """
    _ending.reword = change


def end(message: str, code: int = 1) -> None:
    """End this process at once, wherever its threads are; does not return.

    Args:
        message: What has happened.
        code: Exit code.
    """
    _ending.lock.acquire()  # and never let go: nobody says anything after it
    with suppress(Exception):  # standard error may be closed, the disk with the state gone
        ours = os.dup(sys.stderr.fileno())
        # JAX's threads are about to say the same in twenty lines.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        advice = ""
        with suppress(Exception):
            advice = _ending.advice()
        line = _ending.reword("; ".join(each for each in (message, advice) if each))
        os.write(ours, f"jhessians: error: {line}\n".encode())
    os._exit(code)


def keep_quiet(wanted: bool = True) -> None:
    """Say whether `quiet_ends` does anything.

    Args:
        wanted: Then the caller's own streams must not write to descriptor 2.
    """
    _ending.quiet = wanted


def quiet_ends() -> None:
    """Keep back what JAX's threads write of processes that are gone, and let aborts wait for it.

    Nothing is done before `keep_quiet`.
    """
    if not _ending.quiet or _ending.filtered is not None:
        return
    with suppress(OSError):  # without standard error there is nothing to keep back
        reading, writing = os.pipe()
        _ending.filtered = os.dup(2)
        os.dup2(writing, 2)
        os.close(writing)
        arguments = (reading, _ending.filtered)
        threading.Thread(target=_pass_on, args=arguments, name="errors", daemon=True).start()
    with suppress(Exception):  # a C library without them
        c = ctypes.CDLL(None)
        c.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        # Called with the signal's number, 6: the thread that aborts sleeps for as many seconds.
        c.signal(int(signal.SIGABRT), ctypes.cast(c.sleep, ctypes.c_void_p))


def _pass_on(reading: int, writing: int) -> None:
    """Write the lines that are no trace of another process's end."""
    is_new, is_kept_back = True, False
    while data := os.read(reading, 1 << 16):
        for line in data.splitlines(keepends=True):
            if is_new:  # C++ writes its lines whole
                is_kept_back = _TRACE.match(line) is not None
            is_new = line.endswith(b"\n")
            if not is_kept_back:
                with suppress(OSError):
                    os.write(writing, line)
            elif _FATAL in line:
                time.sleep(LATER)
                end("another process of this run ended or doesn't answer; see its own message")
