"""The checker that `conftest.py` puts on every function of both packages."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

PACKAGES = ["jhessians", "converters"]

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for mypy


def checked(function: Callable) -> Callable:
    """Check a function's arguments and result against its annotations at every call.

    Modules that import names for type checkers alone, so that `--help` needn't wait for JAX, are
    left to mypy: at run time their annotations name nothing. None of them may have a shape in its
    annotations (`test_checking.py`).
    """
    if "TYPE_CHECKING" in function.__globals__:
        return function
    return _check(function)
