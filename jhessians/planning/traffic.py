"""What a traced computation moves: to other devices, and between a device and its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jhessians.planning.liveness import IN_PLACE, MADE
from jhessians.planning.program import Operation, Program, program_of

_SENT: dict[str, Callable[[int, int, int], float]] = {
    # Of n devices in a ring; before and after are bytes of a device's array.
    "all_gather": lambda before, after, n: (n - 1) * before,
    "all_gather_invariant": lambda before, after, n: (n - 1) * before,
    "reduce_scatter": lambda before, after, n: (n - 1) * after,
    "psum": lambda before, after, n: 2 * (n - 1) / n * before,
    "psum_invariant": lambda before, after, n: 2 * (n - 1) / n * before,
    "pmax": lambda before, after, n: 2 * (n - 1) / n * before,
    "all_to_all": lambda before, after, n: (n - 1) / n * before,
    "ppermute": lambda before, after, n: before,
}
"""By the operation: bytes that a device sends."""


def sent_bytes(program: Program, axes: Mapping[str, int]) -> float:
    """Bytes that each device sends to others while the program runs.

    Of a branch the one that sends most is counted, of a loop whose length isn't known one round.

    Args:
        program: What one device does.
        axes: Name of a mesh axis → how many devices lie along it.

    Returns:
        Bytes.
    """

    def of(program: Program, each: Operation) -> float:
        if each.name not in _SENT:
            return 0.0
        n = math.prod(axes[name] for name in _axes_of(each.params))
        before = sum(program.bytes_of(x) for x in each.reads if x is not None)
        return _SENT[each.name](before, sum(map(program.bytes_of, each.writes)), n)

    return _added_up(program, of)


def moved_bytes(program: Program) -> float:
    """Bytes that products, reductions and copies read from the device's memory and write to it.

    What lies between them is computed as they read. Branches and loops are as in `sent_bytes`.

    Args:
        program: What one device does.

    Returns:
        Bytes.
    """

    def of(program: Program, each: Operation) -> float:
        if each.name not in MADE and not each.name.startswith("reduce"):
            return 0.0
        # What is changed in place is not touched but there; a row that is looked up, likewise.
        partly = each.name in IN_PLACE or each.name == "gather"
        reads = each.reads[1:] if partly else each.reads
        read = sum(program.bytes_of(x) for x in reads if x is not None)
        return 2 * read if partly else read + sum(map(program.bytes_of, each.writes))

    return _added_up(program, of)


def _added_up(program: Program, of: Callable[[Program, Operation], float]) -> float:
    """The sum over all operations, as often as they are done."""
    total = 0.0
    for each in program.operations:
        if each.name == "scan":
            body = program_of(each.params["jaxpr"])
            total += each.params["length"] * _added_up(body, of)
        elif each.name == "while":
            total += _added_up(program_of(each.params["body_jaxpr"]), of)
        elif each.name == "cond":
            branches = map(program_of, each.params["branches"])
            total += max(_added_up(branch, of) for branch in branches)
        else:
            total += of(program, each)
    return total


def _axes_of(params: Mapping[str, Any]) -> tuple[str, ...]:
    names = params.get("axis_name", params.get("axes", ()))
    return names if isinstance(names, tuple) else (names,)
