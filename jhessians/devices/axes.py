"""The sizes of a mesh's axes, as they are asked for or chosen; JAX is not imported."""

import math
import re

from jhessians.errors import MeshError

LONGEST_AXIS = 7
"""Devices along an axis. Measured: over a flat axis of 8 chips of a v5p, or of 16 of a v5e, XLA
reduces every factor whole on every chip, instead of each its own rows."""

FORMS = "sizes such as 4x2, or names and sizes such as data=4,fsdp=2"
ROLES = ("data", "fsdp")


def parse_axes(text: str) -> dict[str, int]:
    """Read the axes of a mesh as a person writes them.

    Args:
        text: Sizes such as "4x2"; or sizes of the roles `data` and `fsdp`, such as
            "data=4,fsdp=2" or "data=4x4,fsdp=4x4".

    Returns:
        Name of each axis → its size: `devices0`, `devices1` and so on; or `data` and `fsdp`,
        numbered where a role has several axes.

    Raises:
        MeshError: If it can't be read.
    """
    axes: dict[str, int] = {}
    parts = [part.partition("=") for part in text.replace(" ", "").split(",")]
    for name, equals, sizes in parts:
        if not equals:
            name, sizes = "devices", name
        allowed = ROLES if equals else ("devices",) * (len(parts) == 1)
        if name not in allowed or not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})*", sizes):
            raise MeshError(f"`mesh` is {text!r}; expected {FORMS}")
        if any(axis.startswith(name) for axis in axes):
            raise MeshError(f"`mesh` {text!r} names {name} twice; give its sizes as {name}=4x2")
        numbers = [int(size) for size in sizes.split("x")]
        numbered = len(numbers) > 1 or not equals
        axes |= {f"{name}{i}" if numbered else name: n for i, n in enumerate(numbers)}
    return axes


def size_of(axes: dict[str, int]) -> int:
    """How many devices axes have together."""
    return math.prod(axes.values())


def short_factors(count: int, longest: int = LONGEST_AXIS) -> tuple[int, ...]:
    """A number as a product of factors up to `longest`, where its divisors allow.

    Args:
        count: At least 1.
        longest: The largest factor that is wanted.

    Returns:
        The factors, each above 1; none of 1.
    """
    factors = []
    while count > longest:
        factor = next((f for f in range(longest, 1, -1) if count % f == 0), count)
        factors.append(factor)
        count //= factor
    return (*factors, count) if count > 1 else tuple(factors)
