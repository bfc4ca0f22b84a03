"""`python -m jhessians`, the same as the installed `jhessians`."""

import os
import sys
from typing import NoReturn

from jhessians.cli import main


def run() -> NoReturn:
    """Run the command line of `sys.argv` and end the process with its exit code."""
    code = main()
    if code and "jax" in sys.modules:
        # Devices may still be computing and other hosts waiting for this one: in an orderly end JAX
        # crashes on the first and waits for the second.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
