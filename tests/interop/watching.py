"""Shows that reading a file does nothing but read: Python's audit events, watched."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DANGEROUS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen")
DANGEROUS += ("exec", "compile", "pickle.find_class", "marshal.loads", "ctypes.dlopen")
DANGEROUS += ("os.remove", "os.rename", "os.mkdir", "shutil.rmtree", "socket.connect")

_alarms: list[str] | None = None  # None while nobody watches


def _watch(event: str, arguments: tuple) -> None:
    if _alarms is None:
        return
    if event in DANGEROUS:
        _alarms.append(event)
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _alarms.append(f"open {arguments}")


sys.addaudithook(_watch)  # can't be removed; `_alarms` turns it on


@contextmanager
def only_reading() -> Iterator[None]:
    """Fail if the block writes, runs, compiles or connects to anything."""
    global _alarms
    _alarms = []
    try:
        yield
    finally:
        alarms, _alarms = _alarms, None
        assert not alarms, alarms
