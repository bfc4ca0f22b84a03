"""A traced computation as one list of operations, the calls among them written out.

Loops stay operations with a body of their own. Arrays are numbers, so that those of a call's body
and those outside can't be confused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

CALLS = frozenset({
    "pjit", "jit", "closed_call", "core_call", "checkpoint", "remat2", "shard_map",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
})  # fmt: skip
"""What XLA sees only the inside of."""


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: JAX's name of it.
        params: Its parameters.
        reads: Arrays, None for constants of the program.
        writes: Arrays.
    """

    name: str
    params: dict[str, Any]
    reads: Sequence[int | None]
    writes: Sequence[int]


@dataclass
class Program:
    """A computation.

    Attributes:
        arguments: Arrays that it is given.
        operations: In the order of the program.
        results: Arrays that it returns, None for constants.
        forms: Shape and number format of every array.
        constants: Arrays that are a part of the program.
    """

    arguments: list[int]
    operations: list[Operation]
    results: list[int | None]
    forms: list[Any] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)

    def bytes_of(self, array: int) -> int:
        """How much memory an array takes."""
        return bytes_of(self.forms[array])


def bytes_of(form: Any) -> int:
    """How much memory an array of this shape and number format takes."""
    dtype = getattr(form, "dtype", None)
    if dtype is None:
        return 0
    itemsize = np.dtype(dtype).itemsize if not jax.dtypes.issubdtype(
        dtype, jax.dtypes.extended) else 8  # fmt: skip
    return math.prod(form.shape) * itemsize


def trace(function: Callable[..., Any], *arguments: Any) -> Program:
    """What one device does in a function of arrays, where that isn't dead.

    Args:
        function: Computes with one `shard_map`, or with none on a single device.
        arguments: Pytrees of arrays or shapes.

    Returns:
        The program, inside the `shard_map` if there is one.
    """
    whole = jax.make_jaxpr(function)(*arguments).jaxpr
    for equation in whole.eqns:
        if equation.primitive.name == "shard_map":
            whole = equation.params["jaxpr"]
    alive, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars), instantiate=True)
    return program_of(alive)


def program_of(jaxpr: Any) -> Program:
    """A jaxpr as a program.

    Args:
        jaxpr: Open or closed.

    Returns:
        Its operations, calls written out.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    program = Program([], [], [])

    def new(variable: Any) -> int:
        program.forms.append(variable.aval)
        return len(program.forms) - 1

    def constant(variable: Any) -> int:
        program.constants.append(new(variable))
        return program.constants[-1]

    def write_out(jaxpr: Any, arguments: Sequence[int]) -> list[int | None]:
        known = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable in jaxpr.constvars:
            known[variable] = constant(variable)
        for equation in jaxpr.eqns:
            reads = [None if isinstance(x, core.Literal) else known[x] for x in equation.invars]
            body = _body_of_call(equation)
            if body is None:
                writes = [new(x) for x in equation.outvars]
                name = equation.primitive.name
                program.operations.append(Operation(name, equation.params, reads, writes))
            else:
                given = [constant(x) if at is None else at
                         for x, at in zip(equation.invars, reads, strict=True)]  # fmt: skip
                found = write_out(body, given[len(given) - len(body.invars) :])
                writes = [constant(x) if at is None else at
                          for x, at in zip(equation.outvars, found, strict=True)]  # fmt: skip
            known.update(zip(equation.outvars, writes, strict=True))
        return [None if isinstance(x, core.Literal) else known[x] for x in jaxpr.outvars]

    program.arguments = [new(variable) for variable in jaxpr.invars]
    program.results = write_out(jaxpr, program.arguments)
    return program


def as_soon_as_possible(program: Program) -> Program:
    """The same program with each operation as early as what it reads allows.

    Args:
        program: In any order.

    Returns:
        Operations by the longest chain of others that they wait for, which is how XLA's scheduler
        for CPUs orders them, to keep many cores busy.
    """
    ready: dict[int, int] = {}
    levels = []
    for each in program.operations:
        level = 1 + max((ready.get(x, 0) for x in each.reads if x is not None), default=0)
        ready |= dict.fromkeys(each.writes, level)
        levels.append(level)
    order = sorted(range(len(levels)), key=levels.__getitem__)
    return replace(program, operations=[program.operations[number] for number in order])


def _body_of_call(equation: Any) -> Any:
    """What a call computes; None if the equation is no call."""
    if equation.primitive.name not in CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in equation.params:
            return getattr(equation.params[name], "jaxpr", equation.params[name])
    return None
