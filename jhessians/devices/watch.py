"""The processes of one run watch each other: when one dies, the others end, and say which it was.

Each holds a connection to the first one, which the kernel closes when a process ends, however it
does. A computation that waits for a dead process would wait for ever on accelerators.
"""

from __future__ import annotations

import atexit
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

PATIENCE = 15.0
"""Seconds in which a process may end by itself, with an error of its own, once another is gone."""

CONNECTING = 20.0
"""Seconds in which the others come; where a firewall keeps one away, nobody watches it."""

_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # for hosts that vanish


class _Watch:
    """What this process knows of the others."""

    def __init__(self) -> None:
        self.names: Sequence[str] = ()
        self.lost: int | None = None
        self.advice: Callable[[], str] = lambda: ""
        self.known, self.leaving = threading.Event(), threading.Event()


_watch = _Watch()


def watch(index: int, count: int, exchange: Callable[[str], Sequence[str]]) -> None:
    """Watch the other processes of this run, in a thread, until this one ends.

    Args:
        index: This process's number; the first one, 0, is whom the others connect to.
        count: How many there are.
        exchange: Takes a line and gives every process's, in order; all of them call it.
    """
    listener = socket.create_server(("", 0), backlog=count) if index == 0 else None
    port = listener.getsockname()[1] if listener else 0
    mine = f"{port} {secrets.token_hex(8)} {socket.gethostname()}"
    lines = [line.split(" ", 2) for line in exchange(mine)]
    _watch.names = [name for _, _, name in lines]
    secret = bytes.fromhex(lines[0][1])  # whoever else connects isn't of this run
    # Registered after JAX's own, so called before it: from then on an end is no surprise.
    atexit.register(_watch.leaving.set)
    if listener is not None:
        target: Callable[[], None] = lambda: _watch_all(listener, count, secret)  # noqa: E731
    else:
        address = (_first_host(lines[0][2]), int(lines[0][0]))
        target = lambda: _watch_first(address, index, secret)  # noqa: E731
    threading.Thread(target=target, name="watch", daemon=True).start()


def advise(advice: Callable[[], str]) -> None:
    """Say in the line with which this process ends, once another is gone, what to do.

    Args:
        advice: Gives a clause, empty if there is nothing to do.
    """
    _watch.advice = advice


def loss(seconds: float = PATIENCE) -> str:
    """Which process is gone, if that is known or gets known soon.

    Args:
        seconds: How long to wait for it.

    Returns:
        Such as "process 1 (host a) of this run ended; see its own message, if it left one".
    """
    known = _watch.names and _watch.known.wait(seconds)
    return _describe(_watch.lost if known else None)


def _describe(index: int | None) -> str:
    name = "another process"
    if index is not None:
        name = f"process {index} (host {_watch.names[index]})"
    return f"{name} of this run ended; see its own message, if it left one"


def _first_host(name: str) -> str:
    """Where the first process is: as the others know its coordinator, or by its name."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    return address.rpartition(":")[0].strip("[]") or name


def _watch_all(listener: socket.socket, count: int, secret: bytes) -> None:
    """What the first process does: wait for one to go, and tell the others."""
    others: dict[socket.socket, int] = {}
    end = time.monotonic() + CONNECTING
    with listener:
        while len(others) < count - 1 and (left := end - time.monotonic()) > 0:
            with suppress(OSError):
                listener.settimeout(left)
                connection, _ = listener.accept()
                other = _greeting(connection, secret)
                if other is not None:
                    _keep_alive(connection)
                    others[connection] = other
    while others:
        for connection in select.select(list(others), [], [])[0]:
            if _read(connection):
                continue
            index = others.pop(connection)
            for each in others:
                with suppress(OSError):
                    each.sendall(index.to_bytes(4, "big"))
            _end(index, PATIENCE)


def _greeting(connection: socket.socket, secret: bytes) -> int | None:
    """The number of the process that connects; None if it isn't of this run."""
    connection.settimeout(1)
    try:
        data = connection.recv(len(secret) + 4, socket.MSG_WAITALL)
    except OSError:
        data = b""
    if data[:-4] == secret:
        return int.from_bytes(data[-4:], "big")
    connection.close()
    return None


def _watch_first(address: tuple[str, int], index: int, secret: bytes) -> None:
    """What every other process does."""
    with suppress(OSError):
        connection = socket.create_connection(address, CONNECTING)
        connection.settimeout(None)
        _keep_alive(connection)
        connection.sendall(secret + index.to_bytes(4, "big"))
        while data := _read(connection):
            _end(int.from_bytes(data, "big"), PATIENCE)
        # Without its coordinator JAX ends this process at once, with a trace of its own stack.
        _end(0, 0)


def _read(connection: socket.socket) -> bytes:
    """Four bytes; none if the other side is gone."""
    try:
        return connection.recv(4, socket.MSG_WAITALL)
    except OSError:
        return b""


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _end(index: int, patience: float) -> None:
    """End this process, which can't go on without that one, unless it is about to end anyway."""
    if _watch.leaving.is_set():
        return
    _watch.lost = index
    _watch.known.set()
    if patience:
        time.sleep(patience)
        if _watch.leaving.is_set():
            return
    with suppress(Exception):  # standard error may be closed, the disk with the state gone
        _say_last(f"jhessians: error: {_describe(index)}")
    os._exit(1)


def _say_last(line: str) -> None:
    """Write a line to standard error, and let nobody write after it."""
    ours = os.dup(sys.stderr.fileno())
    # JAX's threads are about to say the same in twenty lines.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(ours, line.encode())
    advice = _watch.advice()
    os.write(ours, f"; {advice}\n".encode() if advice else b"\n")
