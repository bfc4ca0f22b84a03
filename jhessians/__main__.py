"""`python -m jhessians`, the same as the installed `jhessians`."""

import sys

from jhessians.cli import main

if __name__ == "__main__":
    sys.exit(main())
