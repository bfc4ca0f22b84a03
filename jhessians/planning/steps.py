"""What one step of a pass takes on each device, from shapes alone: the real step is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jhessians.capture.fold import Fold, JointFold
from jhessians.capture.problem import Problem
from jhessians.capture.traversal import accumulate, initialize
from jhessians.planning.liveness import peak_bytes
from jhessians.planning.program import as_soon_as_possible, trace
from jhessians.planning.traffic import moved_bytes, sent_bytes
from jhessians.typing import DTypeLike, PyTree

CPU = "cpu"

GAPS = {CPU: 1.2}
"""By platform: temporary memory as a multiple of what is alive in it. XLA lays buffers out before a
program runs, with gaps between them; measured on twenty steps of CPUs, 1.02 to 1.4 times."""


@dataclass(frozen=True)
class Step:
    """One batch on one device.

    Attributes:
        weights: Bytes of the model that the device keeps, and of its documents.
        statistics: Bytes of the running sums, and of what the fold reads besides.
        temporary: Bytes of everything else, at the fullest moment.
        sent: Bytes that go to other devices.
        moved: Bytes that are read from the device's memory or written to it.
    """

    weights: int
    statistics: int
    temporary: int
    sent: float
    moved: float

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return self.weights + self.statistics + self.temporary


def step_of(
    fold: Fold | JointFold,
    problem: Problem,
    batch: PyTree[jax.ShapeDtypeStruct],
    *,
    operands: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    platform: str = CPU,
) -> Step:
    """What one step takes.

    Args:
        fold: What is computed at every linear.
        problem: Loss, linears, a model of shapes, and a mesh that may be abstract.
        batch: Shapes of all devices' documents.
        operands: Shapes of what the fold needs, by site.
        dtype: Number format of the sums; by default the fold's.
        platform: Whose compiler orders the operations.

    Returns:
        Bytes on each device.
    """
    graph, state = nnx.split(problem.model)
    statistics = jax.eval_shape(lambda: initialize(fold, problem, dtype=dtype))
    statistics, operands = jax.tree.map(_bare, (statistics, dict(operands or {})))

    def step(state: Any, batch: Any, statistics: Any, operands: Any) -> Any:
        here = problem.of(nnx.merge(graph, state))
        return accumulate(fold, here, batch, statistics, operands=operands)

    program = trace(step, jax.tree.map(_bare, state), batch, statistics, operands)
    order = as_soon_as_possible if platform == CPU else None
    sizes = [program.bytes_of(each) for each in program.arguments]
    sums, further = (len(jax.tree.leaves(x)) for x in (statistics, operands))
    first = len(sizes) - further - sums  # sums and operands are the last arguments
    alive = peak_bytes(program, range(first, first + sums), order=order)
    axes = dict(problem.mesh.shape) if problem.mesh else {}
    return Step(
        weights=sum(sizes[:first]),
        statistics=sum(sizes[first:]),
        temporary=int(alive * GAPS.get(platform, 1.0)),
        sent=sent_bytes(program, axes),
        moved=moved_bytes(program),
    )


def _bare(x: Any) -> jax.ShapeDtypeStruct:
    """The shape without its sharding, which a mesh without devices has none of."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
