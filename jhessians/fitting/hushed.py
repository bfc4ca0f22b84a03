"""Orbax works in threads of its own; what they say of errors, a run says in one line itself."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 5.0
"""Seconds that the threads get to end: they have failed, or nobody waits for their work."""


@contextmanager
def hushed() -> Iterator[None]:
    """Keep back what Orbax logs and what its threads leave unhandled, until they have ended.

    Threads of C++ that it has begun can't be waited for: after an error, what they leave unhandled
    is kept back from then on, too. Of a failed save's tasks asyncio speaks when they are collected,
    at any time; that is kept back for good.

    Yields:
        Nothing.
    """

    def is_wanted(record: logging.LogRecord) -> bool:
        # The record names absl's file where another library has made its logger.
        frame: FrameType | None = sys._getframe()
        while frame is not None and not _is_orbaxs(frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        return frame is None

    def on_lost(lost: sys.UnraisableHookArgs) -> None:
        # A loop that a failed save closed, whose tasks are collected or called back afterwards.
        if str(lost.exc_value) != "Event loop is closed":
            hook(lost)

    logger = logging.getLogger("absl")
    logger.addFilter(is_wanted)
    logging.getLogger("asyncio").addFilter(_is_anothers)
    hook, sys.unraisablehook = sys.unraisablehook, on_lost
    try:
        yield
    except BaseException:
        _outlast_threads()
        logger.removeFilter(is_wanted)
        raise
    _outlast_threads()
    sys.unraisablehook = hook
    logger.removeFilter(is_wanted)


def _outlast_threads() -> None:
    end = time.monotonic() + PATIENCE
    for thread in threading.enumerate():
        if _is_orbaxs(type(thread).__module__):
            thread.join(max(0.0, end - time.monotonic()))


def _is_anothers(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    ours = "orbax" in said or "tensorstore" in said
    return not (ours and "exception was never retrieved" in said)


def _is_orbaxs(module: str) -> bool:
    return module.split(".")[0] == "orbax"
