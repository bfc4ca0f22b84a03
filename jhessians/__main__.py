"""`python -m jhessians`, the same as the installed `jhessians`."""

import gc
import os
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

OBJECTS_PER_COLLECTION = 100_000
"""Imports and traces make millions of objects that live on: by Python's default, 700, the garbage
collector takes 0.4 of the 3.7 s before the first step, and finds next to nothing."""


def run() -> NoReturn:
    """Run the command line of `sys.argv` and end the process with its exit code."""
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    try:
        # Imported here, since an interrupt may come before it is.
        from jhessians.cli.main import main
        from jhessians.cli.streams import settle, take_standard_places

        take_standard_places()
        code = main()
        settle()
    except KeyboardInterrupt:
        with suppress(Exception):
            print("jhessians: error: interrupted", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    if code and "jax" in sys.modules:
        # Devices may still be computing and other hosts waiting for this one: in an orderly end JAX
        # crashes on the first and waits for the second.
        with suppress(Exception):  # half imported, if the import was interrupted
            if sys.modules["jax"].distributed.is_initialized():
                # The first process coordinates the others, which die without it: they may want to
                # say first what they know.
                time.sleep(1)
        os._exit(code)
    # All is done, and an interrupt of Python's own end would be a traceback.
    with suppress(ValueError):  # in a thread
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


if __name__ == "__main__":
    run()
