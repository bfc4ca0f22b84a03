"""A pass over the data: a fold's sums over all batches.

A call of the compiled step sums several batches of one shape. XLA takes its temporary memory anew
for every call, and the system hands it out page by page: for small models on 2 cores, 8 batches a
call take 0.9 of the time of 8 calls.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jhessians.capture.checks import require_fit
from jhessians.capture.fold import Fold, JointFold
from jhessians.capture.problem import Problem
from jhessians.capture.site import Operands, Statistics
from jhessians.capture.traversal import accumulate, initialize, shaped_rows
from jhessians.devices.hosts import fetch
from jhessians.devices.memory import return_freed_memory
from jhessians.devices.mesh import parameter_shapes_on, platform_of, put_batches
from jhessians.errors import NumericsError
from jhessians.fitting.checkpoints import Series
from jhessians.typing import DTypeLike, PyTree

COMPILER_OPTIONS = {"cpu": {"xla_backend_optimization_level": 1}}
"""By platform. Where LLVM compiles what lies between the products, its first level of optimisation
takes two thirds of the default's time, and the passes run as fast."""

MOST_BATCHES = 8
WORK_OF_A_CALL = 2e11
"""Positions times weights, about a tenth of the arithmetic: seconds on a CPU, so that progress is
seen to be made. It depends on shapes alone, so that all hosts take as many batches."""


class Pass:
    """One fold's pass, whose step is compiled once for each shape of a batch.

    Args:
        fold: What to compute at every linear.
        problem: Loss, model, linears and devices.
        dtype: Number format of the sums; by default the one that the fold's shapes name.
    """

    def __init__(self, fold: Fold | JointFold, problem: Problem, *, dtype: DTypeLike | None = None):
        self.fold, self.problem, self.dtype = fold, problem, dtype
        graph, state = nnx.split(problem.model)
        self._state = parameter_shapes_on(state, problem.mesh)

        # The statistics are donated: sums are updated in place.
        @partial(
            jax.jit,
            donate_argnums=2,
            compiler_options=COMPILER_OPTIONS.get(platform_of(problem.mesh)),
        )
        def step(state, batches, statistics, operands, count):
            def add(number, sums):
                statistics, losses = sums
                batch = jax.tree.map(lambda x: x[number], batches)
                here = problem.of(nnx.merge(graph, state))
                statistics, loss = accumulate(fold, here, batch, statistics, operands=operands)
                return statistics, losses.at[number].set(loss.astype(losses.dtype))

            losses = jnp.zeros(len(jax.tree.leaves(batches)[0]), jnp.float32)
            return lax.fori_loop(0, count, add, (statistics, losses))

        self._step = step
        self._ahead: threading.Thread | None = None
        self._checked = False

    def run(
        self,
        batches: Iterable[PyTree[np.ndarray]],
        *,
        operands: Operands | None = None,
        advance: Callable[[int], None] = lambda positions: None,
        kept: Series | None = None,
    ) -> Statistics:
        """Sum over all batches; arguments, result and errors are those of `run_pass`."""
        kept = kept or Series()
        saved = kept.load(lambda position: self.shapes_of_sums())
        done, running = (saved.position["batches"] if saved else 0), None
        statistics = saved.arrays if saved else self.initialize()
        batches = iter(batches)
        if done:
            advance(sum(map(self._counted, islice(batches, done))))
        if self._ahead:  # or its step would be compiled twice at the same time
            self._ahead.join()
        for group in self._groups(batches):
            if not self._checked:
                check_fold(self.fold, self.problem, group[0], statistics, operands)
                self._checked = True
            statistics, losses = self._step(*self._arguments(group, statistics, operands))
            # The host is one call ahead of the devices, never more.
            if running:
                done = self._finish(done, *running, advance)
            else:  # it was compiled just now
                return_freed_memory()
            running = (group, losses)
            if kept.due():  # losses are looked at first: no sum that isn't finite is saved
                done, running = self._finish(done, *running, advance), None
                kept.save({"batches": done}, statistics)
        if running:
            done = self._finish(done, *running, advance)
        kept.finish({"batches": done}, statistics)
        return statistics

    def initialize(self) -> Statistics:
        """The sums before the first batch: zeros."""
        return initialize(self.fold, self.problem, dtype=self.dtype)

    def lower(
        self,
        batch: PyTree[np.ndarray | jax.ShapeDtypeStruct],
        statistics: Statistics | None = None,
        operands: Operands | None = None,
    ) -> jax.stages.Lowered:
        """The step for batches of one shape, not compiled yet.

        Where the problem's model holds shapes (`nnx.eval_shape`), a batch does, and the mesh is of
        the devices of a topology (`jhessians.topology_devices`), no device and no memory is needed.

        Args:
            batch: As `run` gets them; or shapes, of the global batch.
            statistics: The running sums, or their shapes and shardings; by default those of the
                fold.
            operands: Further arrays that the fold needs, or their shapes and shardings, such as
                `jhessians.eigenvector_shapes` gives for the eigenvalue correction.

        Returns:
            The step, for one call's batches.
        """
        statistics = self.shapes_of_sums() if statistics is None else statistics
        return self._step.lower(*self._arguments([batch], statistics, operands))

    def compile_ahead(self, batch: PyTree[np.ndarray], operands: Operands | None = None) -> None:
        """Compile the step for batches like this one in a thread, while the caller goes on.

        XLA compiles on one core; an error is left to `run`, which meets it again. On several hosts
        nothing happens: all of them must compile in one order.

        Args:
            batch: As `run` gets them.
            operands: Arrays, or their shapes and shardings.
        """
        if self.problem.hosts > 1:
            return
        wide = jax.config.read("jax_enable_x64")  # which a thread has of its own

        def compile() -> None:
            with suppress(Exception), jax.enable_x64(wide):
                self.lower(batch, operands=operands).compile()
            return_freed_memory()

        self._ahead = threading.Thread(target=compile, name="compile ahead", daemon=True)
        self._ahead.start()

    def shapes_of_sums(self) -> PyTree[jax.ShapeDtypeStruct]:
        """What the sums look like, with their shardings, before there are any."""
        shapes = jax.eval_shape(self.initialize)
        return shaped_rows(self.problem.sites, shapes, self.problem.mesh)

    def _arguments(self, group, statistics, operands):
        most = self._batches_of_a_call(group[0])
        filled = [*group, *[group[-1]] * (most - len(group))]
        batches = put_batches(jax.tree.map(_stacked, *filled), self.problem.mesh)
        return self._state, batches, statistics, operands or {}, np.int32(len(group))

    def _groups(self, batches: Iterable[PyTree[np.ndarray]]) -> Iterator[list[PyTree[np.ndarray]]]:
        """Batches in order, those of one call together."""
        group: list[PyTree[np.ndarray]] = []
        size = 1  # a pass begins with one, to show soon how it goes on
        for batch in untraced(self.problem, batches):
            if group and (len(group) == size or _shapes(batch) != _shapes(group[0])):
                yield group
                size, group = self._batches_of_a_call(batch), []
            group.append(batch)
        if group:
            yield group

    def _batches_of_a_call(self, batch: PyTree[np.ndarray]) -> int:
        mask = self.problem.mask(batch)
        positions = len(jax.tree.leaves(batch)[0]) if mask is None else mask.size
        sites = self.problem.sites.values()
        weights = sum(s.in_features * s.out_features * len(s.slots) for s in sites)
        return int(np.clip(WORK_OF_A_CALL / (positions * weights), 1, MOST_BATCHES))

    def _finish(self, done, group, losses, advance) -> int:
        """Wait for a call's batches and count them."""
        for number, loss in enumerate(fetch(losses)[: len(group)], start=done + 1):
            if not np.isfinite(loss):
                raise NumericsError(
                    f"the loss of batch {number} is {loss}; expected a finite number: check the "
                    "weights, or compute in float32 (`precision` fp32)"
                )
        advance(sum(map(self._counted, group)))
        return done + len(group)

    def _counted(self, batch: PyTree[np.ndarray]) -> int:
        """About how many positions of a batch count, on all hosts."""
        mask = self.problem.mask(batch)
        return 0 if mask is None else int(mask.sum()) * self.problem.hosts


def run_pass(
    fold: Fold | JointFold,
    problem: Problem,
    batches: Iterable[PyTree[np.ndarray]],
    *,
    dtype: DTypeLike | None = None,
    operands: Operands | None = None,
    advance: Callable[[int], None] = lambda positions: None,
    kept: Series | None = None,
) -> Statistics:
    """Sum a fold over all batches.

    Args:
        fold: What to compute at every linear.
        problem: Loss, model, linears and devices.
        batches: This host's rows of each batch, as numpy.
        dtype: Number format of the sums; by default the one that the fold's shapes name.
        operands: Further arrays that the fold needs, by site.
        advance: Called when some batches are done, with how many of their positions counted. With
            several hosts it is an estimate from those of this host.
        kept: Where running sums are saved, and from where they are continued.

    Returns:
        The sums, packed and by site; `unpack` makes whole arrays of them, by module.

    Raises:
        FoldError: If a term has another shape than the fold's `shapes` says, a statistic is a
            scalar, or an operand is missing.
        NumericsError: If a batch's loss isn't finite.
        TypeError: Inside a caller's own jit.
        ValueError: As in `accumulate`.
    """
    return Pass(fold, problem, dtype=dtype).run(
        batches, operands=operands, advance=advance, kept=kept
    )


def check_fold(
    fold: Fold | JointFold,
    problem: Problem,
    batch: PyTree[np.ndarray],
    statistics: Statistics,
    operands: Operands | None,
) -> None:
    """Check a fold outside of jit, which would add lines of its own to the error.

    Args:
        fold: What to compute at every linear.
        problem: Loss, model, linears and devices.
        batch: This host's rows.
        statistics: The running sums, or their shapes.
        operands: Further arrays that the fold needs, by site.

    Raises:
        FoldError, ValueError: As in `require_fit`.
    """
    mask = problem.mask(batch)
    require_fit(
        fold, problem, statistics, operands=operands,
        documents=len(jax.tree.leaves(batch)[0]) * problem.hosts,
        positions=None if mask is None else np.shape(mask)[-1],
    )  # fmt: skip


def untraced(
    problem: Problem, batches: Iterable[PyTree[np.ndarray]]
) -> Iterator[PyTree[np.ndarray]]:
    """The batches; says what to call instead where a pass stands inside a caller's own `jit`.

    Args:
        problem: Its model must not hold tracers.
        batches: Nor may they.

    Yields:
        Each batch.

    Raises:
        TypeError: If the model or a batch holds tracers, or all that is computed is traced.
    """
    model = jax.tree.leaves(nnx.state(problem.model))
    for batch in batches:
        # Inside jit a pass over constants is traced as well, and so is this zero.
        leaves = [*model, *jax.tree.leaves(batch), jnp.zeros(())]
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise TypeError(
                "a pass over batches can't be traced, since it moves them from host to devices; "
                "inside your own jax.jit call initialize, accumulate and unpack instead"
            )
        yield batch


def _stacked(*arrays: Any) -> Any:
    """Arrays side by side; of shapes, the shape of that."""
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
    return np.stack(arrays)


def _shapes(batch: PyTree[np.ndarray]) -> list[tuple[int, ...]]:
    return [np.shape(x) for x in jax.tree.leaves(batch)]
