"""The checker that `conftest.py` puts on every function and dataclass of both packages."""

import re
from collections.abc import Callable

from beartype import BeartypeConf, beartype

PACKAGES = ["jhessians", "converters"]

SHAPED = re.compile(r"\b(Float|Int|UInt|Bool|Shaped|Num|Inexact|Key)\d*\[")

CHECKED: set[tuple[str, str]] = set()
"""Module and name of every function that is checked."""

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for mypy


def checked(function: Callable) -> Callable:
    """Check arguments and result of a function with a shape in its annotations, at every call.

    Others are left to mypy: some check what they are given themselves and say it in one line.
    """
    annotations = getattr(function, "__annotations__", {}).values()
    if not any(SHAPED.search(str(each)) for each in annotations):
        return function
    CHECKED.add((function.__module__, function.__name__))
    return _check(function)
