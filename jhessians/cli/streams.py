"""Standard output and error, which never end a run: what they don't take is dropped.

A reader such as `head` leaves, a log's disk is full, a terminal is closed, or the shell gave no
stream at all; the work goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from jhessians.devices.ending import keep_quiet


class LastingStream:
    """A text stream that drops what it can't write; in all else the stream inside.

    Attributes:
        failure: The first error, if there was one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write what can be written.

        Returns:
            The text's length, as if all of it had been.
        """
        encoding = self._stream.encoding or "utf-8"
        self._try(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Pass on what is kept back, where that can be."""
        self._try(self._stream.flush)

    def _try(self, method: Any, *arguments: Any) -> None:
        try:
            method(*arguments)
        except OSError as error:
            self.failure = self.failure or error
        except ValueError as error:  # it is closed
            self.failure = self.failure or OSError(str(error))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let `sys.stdout` and `sys.stderr` be `LastingStream`s."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (LastingStream(each or _nowhere()) for each in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def take_standard_places() -> None:
    """Open the null device where the shell left standard input, output or error closed.

    The next file to be opened would take the place, and get what libraries write there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the first free place


def take_own_errors() -> None:
    """Let `sys.stderr` have a descriptor of its own: to the usual one, 2, C++ writes what it likes.

    See `jhessians.devices.ending`.
    """
    with suppress(OSError, ValueError, AttributeError):  # there is none
        old = sys.stderr
        own = os.dup(old.fileno())
        sys.stderr = open(  # noqa: SIM115
            own, "w", buffering=1, encoding=old.encoding, errors=old.errors, newline="\n"
        )
        keep_quiet()


def settle() -> None:
    """Flush both streams for the last time, since Python fails if it can't."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
