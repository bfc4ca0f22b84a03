"""The checker that `conftest.py` puts on every function and dataclass of both packages."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from beartype import BeartypeConf, beartype

ROOT = Path(__file__).parents[1]
PACKAGES = ["jhessians", "converters"]
UNCHECKED = {"jhessians.interop.torchfile"}
"""Its tests watch that nothing is compiled while a file is read, which a checked dataclass does."""

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py" and not path.name.startswith(("_torch", "_safe"))
]
HOOKED = [name for name in MODULES if name not in UNCHECKED]
"""What the import hook is given: all modules of both packages but the readers of torch files."""

SHAPED = re.compile(r"\b(Float|Int|UInt|Bool|Shaped|Num|Inexact|Key)\d*\[")

CHECKED: dict[tuple[str, str], set[str]] = defaultdict(set)
"""Module and function → those of its arguments (or `return`) whose shape is checked."""

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for mypy


def checked(function: Callable) -> Callable:
    """Check arguments and result of a function with a shape in its annotations, at every call.

    Others are left to mypy: some check what they are given themselves and say it in one line. So
    are functions inside of functions, of which a checker would be compiled at every call.

    jaxtyping makes `Any` of an annotation with a name that its module lacks at run time, such as
    one imported for type checkers alone; `test_checking.py` finds a shape among those.
    """
    if "<locals>" in function.__qualname__:
        return function
    annotations = getattr(function, "__annotations__", {})
    shaped = {name for name, each in annotations.items() if SHAPED.search(str(each))}
    if not shaped:
        return function
    CHECKED[function.__module__, function.__qualname__] |= shaped
    return _check(function)
