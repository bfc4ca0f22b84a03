"""The processes of one run watch each other: when one dies or hangs, all end, and say which it was.

Each holds a connection to the first one, which the kernel closes when a process ends, however it
does; over it each tells every few seconds where it is. A computation that waits for a dead process
would wait for ever on accelerators.
"""

from __future__ import annotations

import atexit
import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from jhessians.devices import ending
from jhessians.devices.place import Place, Watcher
from jhessians.devices.stalls import Seen, stalled
from jhessians.files import parse_json

PATIENCE = 15.0
"""Seconds in which a process may end by itself, with an error of its own, once another is gone."""

AFTER_THE_FIRST = 3.0
"""The same once the first one is gone, without which JAX aborts; `ending` holds that up."""

CONNECTING = 20.0
"""Seconds in which the others come; where a firewall keeps one away, nobody watches it."""

BEAT = 2.0
"""Seconds between two reports."""

# For hosts that vanish: seconds of silence, and milliseconds without an answer to what was sent.
_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class _Watch:
    """What this process knows of the others."""

    def __init__(self) -> None:
        self.names: Sequence[str] = ()
        self.lost: int | None = None
        self.known, self.leaving = threading.Event(), threading.Event()


_watch = _Watch()


def watch(
    index: int, count: int, first: str, exchange: Callable[[str], Sequence[str]], seconds: float
) -> None:
    """Watch the other processes of this run, in a thread, until this one ends.

    Args:
        index: This process's number; the first one, 0, is whom the others connect to.
        count: How many there are.
        first: Under which name the others reach the first one's machine.
        exchange: Takes a line and gives every process's, in order; all of them call it.
        seconds: After so long without a move of any process the run ends; infinite for never.
    """
    listener = socket.create_server(("", 0), backlog=count) if index == 0 else None
    port = listener.getsockname()[1] if listener else 0
    mine = f"{port} {secrets.token_hex(8)} {socket.gethostname()}"
    lines = [line.split(" ", 2) for line in exchange(mine)]
    _watch.names = [name for _, _, name in lines]
    secret = bytes.fromhex(lines[0][1])  # whoever else connects isn't of this run
    # Registered after JAX's own, so called before it: from then on an end is no surprise.
    atexit.register(leave)
    if listener is not None:
        target: Callable[[], None] = lambda: _watch_all(listener, count, secret, seconds)  # noqa: E731
    else:
        address = (first, int(lines[0][0]))
        target = lambda: _watch_first(address, index, secret, seconds)  # noqa: E731
    threading.Thread(target=target, name="watch", daemon=True).start()


def is_watched() -> bool:
    """Whether `watch` was called."""
    return bool(_watch.names)


def leave() -> None:
    """This process is about to end by itself: whatever the others do now is no surprise."""
    _watch.leaving.set()


def name_of(index: int) -> str:
    """A process in words, such as "process 1 (host a)"."""
    host = f" (host {_watch.names[index]})" if index < len(_watch.names) else ""
    return f"process {index}{host}"


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
    name = "another process" if index is None else name_of(index)
    return f"{name} of this run ended; see its own message, if it left one"


class _Line:
    """A connection on which both sides write JSON, a line each."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self._rest = connection, b""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Write a message, unless the other side is gone or doesn't read."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None if the other side is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [parse_json(line) for line in lines] if data else None


def _watch_all(listener: socket.socket, count: int, secret: bytes, seconds: float) -> None:
    """What the first process does: wait for one to go or all to hang, and tell the others."""
    others = _connected(listener, count, secret)
    here, told = Watcher(), 0.0
    seen = {index: Seen(here.look(), time.monotonic()) for index in (0, *others.values())}
    for received in _beats(others):
        now = time.monotonic()
        for line, messages in received.items():
            if messages is None:
                index = others.pop(line)
                for each in others:
                    each.send(lost=index)
                _end_after(index, PATIENCE)
            else:
                for message in messages:
                    seen[others[line]].update(Place(**message), now)
        if now - told < BEAT:
            continue
        told = now
        seen[0].update(here.look(), now)
        verdict = stalled(seen, now, seconds, name_of)
        for each in others:
            each.send(end=verdict)
        if verdict and not _watch.leaving.is_set():
            _outlast(others)
            ending.end(verdict)


def _beats(lines: dict[_Line, int]) -> Iterator[dict[_Line, list[dict[str, Any]] | None]]:
    """What has come from the others, at least every few seconds."""
    while True:
        by_socket = {each.socket: each for each in lines}
        ready = select.select(list(by_socket), [], [], BEAT)[0]
        yield {by_socket[each]: by_socket[each].receive() for each in ready}
        if ready:  # or it would answer each of many reports
            time.sleep(BEAT / 10)


def _outlast(others: dict[_Line, int]) -> None:
    """Let the others end first: what is sent to them is lost if this process is gone too early."""
    end = time.monotonic() + 3 * BEAT
    waiting = {each.socket: each for each in others}
    while waiting and (left := end - time.monotonic()) > 0:
        for each in select.select(list(waiting), [], [], left)[0]:
            if waiting[each].receive() is None:
                del waiting[each]


def _connected(listener: socket.socket, count: int, secret: bytes) -> dict[_Line, int]:
    """The other processes, as far as they come in time."""
    others: dict[_Line, int] = {}
    end = time.monotonic() + CONNECTING
    with listener:
        while len(others) < count - 1 and (left := end - time.monotonic()) > 0:
            with suppress(OSError):
                listener.settimeout(left)
                connection, _ = listener.accept()
                other = _greeting(connection, secret)
                if other is not None:
                    others[_Line(connection)] = other
    return others


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


def _watch_first(address: tuple[str, int], index: int, secret: bytes, seconds: float) -> None:
    """What every other process does: tell the first one where it is, and listen to it."""
    with suppress(OSError):
        connection = socket.create_connection(address, CONNECTING)
        connection.sendall(secret + index.to_bytes(4, "big"))
        line, here, told = _Line(connection), Watcher(), 0.0
        first = Seen(Place("its work", None, 0, False), time.monotonic())
        for received in _beats({line: 0}):
            now, messages = time.monotonic(), received.get(line, [])
            if messages is None:
                _end_after(0, AFTER_THE_FIRST)
                return
            if now - told >= BEAT:
                told = now
                line.send(**asdict(here.look()))
            if messages:
                first.heard = first.moved = now
            for message in messages:
                if "lost" in message:
                    _end_after(message["lost"], PATIENCE)
                elif message["end"] and not _watch.leaving.is_set():
                    ending.end(message["end"])
            # The first one judges; but if it is the one that hangs, nobody else does.
            said = stalled({0: first}, now, seconds + 5 * BEAT, name_of)
            if said and not _watch.leaving.is_set():
                ending.end(said)


def _end_after(index: int, patience: float) -> None:
    """End this process, which can't go on without that one, unless it is about to end anyway."""
    if _watch.leaving.is_set():
        return
    _watch.lost = index
    _watch.known.set()
    if _watch.leaving.wait(patience):
        threading.Event().wait()  # it ends by itself
    ending.end(_describe(index))
