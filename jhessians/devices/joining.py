"""A process waits for the others of its run: it says so, and ends if they don't come."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jhessians.devices import ending
from jhessians.devices.clusters import VARIABLES, Member

_log = logging.getLogger("jhessians")

SAYING = 15.0
"""Seconds between two lines."""


@contextmanager
def joining(member: Member, seconds: float) -> Iterator[None]:
    """Say what the block waits for, and end the process if that takes too long.

    JAX waits in C++, where no signal is heard and whose end is an abort.

    Args:
        member: This process.
        seconds: How long is too long.

    Yields:
        Nothing.
    """
    joined = threading.Event()

    def tell() -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if joined.wait(min(SAYING, left)):
                return
            if left > SAYING:
                waited = seconds - (end - time.monotonic())
                _log.warning("%s; %.0f of %.0f s", _missing(member), waited, seconds)
        if not joined.is_set():
            ending.end(
                f"{_missing(member)} for {seconds:.0f} s (`join_minutes`); start all of them, or "
                f"check {VARIABLES}"
            )

    threading.Thread(target=tell, name="joining", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _missing(member: Member) -> str:
    """What this process waits for."""
    me = f"process {member.index} of {member.count} ({member.source})"
    if member.index == 0:
        return f"{me} waits at {member.address} for the other {member.count - 1}"
    host, _, port = member.address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except OSError as error:
        reason = error.strerror or str(error)
        return f"{me} waits for process 0, which doesn't answer at {member.address} ({reason})"
    return f"{me} waits for the others; the coordinator at {member.address} is there"
