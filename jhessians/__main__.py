"""`python -m jhessians`, the same as the installed `jhessians`."""

import gc
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

OBJECTS_PER_COLLECTION = 100_000
"""Imports and traces make millions of objects that live on: by Python's default, 700, the garbage
collector takes 0.4 of the 3.7 s before the first step, and finds next to nothing."""


def run() -> NoReturn:
    """Run the command line of `sys.argv` and end the process with its exit code."""
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    # Ignored as under nohup, or a caller's: left alone.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _end_at_once)
    # Imported here, since an interrupt may come before it is.
    from jhessians.cli.main import main
    from jhessians.cli.streams import settle, take_own_errors, take_standard_places

    take_standard_places()
    take_own_errors()
    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if is_ours:  # all is done and said
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    settle()
    if code:
        # Devices may still be computing and other hosts waiting for this one: in an orderly end JAX
        # crashes on the first and waits for the second.
        with suppress(Exception):  # not imported, or half
            if sys.modules["jax"].distributed.is_initialized():
                # The first process coordinates the others, which die without it: they may want to
                # say first what they know.
                time.sleep(1)
        os._exit(code)
    sys.exit()


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """What Ctrl-C does while nothing is to be unwound: imports may hold an exception back."""
    with suppress(OSError):
        os.write(2, b"jhessians: error: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    run()
