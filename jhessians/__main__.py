"""`python -m jhessians`, the same as the installed `jhessians`."""

import gc
import os
import sys
import time
from contextlib import suppress
from typing import NoReturn

from jhessians.cli.main import main

OBJECTS_PER_COLLECTION = 100_000
"""Imports and traces make millions of objects that live on: by Python's default, 700, the garbage
collector takes 0.4 of the 3.7 s before the first step, and finds next to nothing."""


def run() -> NoReturn:
    """Run the command line of `sys.argv` and end the process with its exit code."""
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    code = main()
    if code and "jax" in sys.modules:
        # Devices may still be computing and other hosts waiting for this one: in an orderly end JAX
        # crashes on the first and waits for the second.
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(Exception):  # half imported, if the import was interrupted
            if sys.modules["jax"].distributed.is_initialized():
                # The first process coordinates the others, which die without it: they may want to
                # say first what they know.
                time.sleep(1)
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
