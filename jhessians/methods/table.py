"""All methods, from the files of this folder; run as a program it prints README's table.

python -m jhessians.methods.table
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from jhessians import methods
from jhessians.config.option import option
from jhessians.config.statistics import STATISTICS
from jhessians.errors import ConfigError, did_you_mean
from jhessians.methods.method import Method


def _found() -> dict[str, Method]:
    """Every `Method` that a module of this folder defines, by name, in the order of their ranks."""
    found: dict[str, Method] = {}
    for file in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        if file.name == __name__ or file.name.endswith(".__main__"):
            continue
        for value in vars(importlib.import_module(file.name)).values():
            if isinstance(value, Method):
                found[value.name] = value
    return dict(sorted(found.items(), key=lambda item: (item[1].rank, item[0])))


METHODS = _found()
"""By name, the default first."""


@dataclass(frozen=True)
class MethodChoice:
    """The option that names a method."""

    method: str = option(
        next(iter(METHODS)),
        "Approximation of the Hessian: "
        + "; ".join(f"{each.name}, {each.summary}" for each in METHODS.values())
        + ".",
        group=STATISTICS,
        metavar="METHOD",
        choices=tuple(METHODS),
    )


def method_named(name: str) -> Method:
    """A method by its name.

    Returns:
        The instance in `METHODS`.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) or f"; there are {', '.join(METHODS)}"
        raise ConfigError(f"there is no method {name!r}{hint}")
    return METHODS[name]


def table() -> str:
    """README's table of methods, in Markdown."""
    default = next(iter(METHODS))
    lines = [
        "| `--method` | formula | multiplications a token and module, besides the model's "
        "| numbers on disk a module | bergson's name | paper |",
        "|---|---|---|---|---|---|",
    ]
    for each in METHODS.values():
        name = f"`{each.name}`" + (" (default)" if each.name == default else "")
        papers = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in each.papers)
        theirs = f"`{each.bergson}`" if each.bergson else "none"
        if each.ev_correction:
            theirs += ", `ev_correction`"
        lines.append(
            f"| {name} | {each.formula} | {each.cost} | {each.disk} | {theirs} | {papers} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
