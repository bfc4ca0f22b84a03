"""A fit of shapes on machines that need not be there: its steps, and what is still open of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jax.sharding import Mesh

from jhessians.capture.site import Site
from jhessians.commands.compute.pipeline import sum_dtype
from jhessians.commands.plan.fit import AbstractFit, abstract_mesh, batch_shapes
from jhessians.data.batching import Batch
from jhessians.fitting import activations
from jhessians.fitting.eigensolver import seconds_of
from jhessians.fitting.memory import EIGENDECOMPOSITION, SHARE
from jhessians.fitting.partitions import partition, unit_count
from jhessians.interop.layout import DTYPES
from jhessians.methods.method import PlannedPass
from jhessians.planning.hardware import Machines
from jhessians.planning.plan import Plan, Stage, budget_of, pass_stage
from jhessians.planning.steps import Step, step_of
from jhessians.report.recorder import gone_through

Group = Mapping[str, Site]
"""Linears that are fitted at once."""


@dataclass(frozen=True)
class Planner:
    """Traces the steps of a fit, as often as its open choices need.

    Attributes:
        fit: The fit.
        machines: On which.
    """

    fit: AbstractFit
    machines: Machines

    def plan(self) -> Plan:
        """The fit as its options are; what they leave open is settled as `compute` does.

        Returns:
            The plan.
        """
        config, method = self.fit.config, self.fit.config.chosen
        tokens, partitions = config.token_batch_size, config.module_partitions
        if isinstance(partitions, str):
            partitions = self.fewest_partitions(tokens)
        group = self.largest_group(partitions)
        kind = self.settled_activations(group, tokens)
        passes, steps = self.passes(group, kind), self.steps(group, tokens, kind)
        batches = self.fit.batches(tokens, self.machines.count)
        problem = self.fit.problem(None, kind)
        longest = batch_shapes(1, int(self.fit.lengths.max()))
        work, through = gone_through(problem, longest)(self.fit.lengths)
        if kind == "recompute":
            through *= 1 + 1 / (1 + problem.draws)
        stages = [
            pass_stage(
                name, [steps[name]] * partitions, self.machines,
                work=[(partitions * through, self._speed(None)),
                      (flop, self._speed(passes[name].dtype))],
                steps=len(batches), padding_share=batches.padding_share,
            )
            for name, flop in method.flop(work, config.method_options).items() if name in steps
        ]  # fmt: skip
        decomposed = 1 if method.factored else len(stages)
        stages.insert(decomposed, self._between(group, next(iter(steps.values())).weights))
        numbers = method.result_numbers(
            self.fit.sites, config.method_options,
            correct_eigenvalues=config.corrects_eigenvalues,
        )  # fmt: skip
        return Plan(
            machines=self.machines, budget=budget_of(self.machines), stages=stages,
            partitions=partitions, token_batch_size=tokens, activations=kind, steps=len(batches),
            tokens=int(self.fit.lengths.sum()), parameters=self.fit.parameters,
            disk=numbers * DTYPES[config.hessian_dtype][1].itemsize,
        )  # fmt: skip

    def largest_group(self, partitions: int) -> Group:
        """Of so many groups the one that takes most memory."""
        return max(partition(self.fit.sites, partitions), key=self._between_bytes)

    def fewest_partitions(self, tokens: int) -> int:
        """The fewest groups whose largest fits each device.

        Args:
            tokens: That a device takes at once.

        Returns:
            How many groups; as many as there can be if even they don't fit.
        """
        low, high = 1, unit_count(self.fit.sites)
        while low < high:
            middle = (low + high) // 2
            if self.peak(self.largest_group(middle), tokens) <= budget_of(self.machines):
                high = middle
            else:
                low = middle + 1
        return low

    def largest_batch(self, group: Group, *, most: int = 1 << 16) -> int | None:
        """The most tokens that a device can take: the longest document's, or 2, 4, 8 … times them.

        Args:
            group: The linears that are fitted at once.
            most: Where the search ends.

        Returns:
            Tokens; None if not even the longest document fits.
        """
        fitting, tokens = None, int(self.fit.lengths.max())
        while tokens <= most and self.peak(group, tokens) <= budget_of(self.machines):
            fitting, tokens = tokens, 2 * tokens
        return fitting

    def peak(self, group: Group, tokens: int) -> int:
        """Bytes of a device at the fullest moment of a group's fit.

        Args:
            group: The linears.
            tokens: That a device takes at once.

        Returns:
            Bytes.
        """
        steps = list(self.steps(group, tokens, self.settled_activations(group, tokens)).values())
        between = self._between(group, steps[0].weights)
        return max(between.device_bytes, *(step.peak for step in steps))

    def passes(self, group: Group, kind: str, mesh: Mesh | None = None) -> dict[str, PlannedPass]:
        """The passes over the data.

        Args:
            group: The linears.
            kind: What is done with activations.
            mesh: Devices to compile for; by default what is known of the machines.

        Returns:
            By the stage's name.
        """
        config = self.fit.config
        problem = self.fit.problem(mesh or abstract_mesh(self.machines), kind)
        return config.chosen.passes(
            replace(problem, sites=group), config.method_options, self.dtype,
            correct_eigenvalues=config.corrects_eigenvalues,
        )  # fmt: skip

    def steps(self, group: Group, tokens: int, kind: str) -> dict[str, Step]:
        """A step of each pass on one device, of the largest batch.

        Args:
            group: The linears.
            tokens: That a device takes at once.
            kind: What is done with activations.

        Returns:
            By the stage's name.
        """
        batch = self.batch(tokens)
        return {
            name: step_of(
                each.fold, each.problem, batch, operands=each.operands, dtype=self.dtype,
                platform=self.machines.device.platform,
            )
            for name, each in self.passes(group, kind).items()
        }  # fmt: skip

    def batch(self, tokens: int) -> Batch:
        """The largest batch of all devices, as shapes."""
        return batch_shapes(*self._largest_shape(tokens))

    def settled_activations(self, group: Group, tokens: int) -> str:
        """`store` or `recompute`, as `compute` would choose.

        Args:
            group: The linears.
            tokens: That a device takes at once.

        Returns:
            The choice.
        """
        config, count = self.fit.config, self.machines.count
        if config.activations != activations.AUTOMATIC:
            return config.activations
        rows, length = self._largest_shape(tokens)
        problem = replace(self.fit.problem(None, "recompute"), sites=group)
        stored = activations.stored_bytes(problem, batch_shapes(rows // count, length))
        taken = config.chosen.statistics_bytes(
            group, config.method_options, self.dtype, partitions=1
        )
        weights = self.fit.parameters * DTYPES[config.precision][1].itemsize
        model = weights // count if config.fsdp else weights
        free = budget_of(self.machines) - model - taken // count
        return activations.choose(stored, max(0, free))

    def _speed(self, dtype: np.dtype | None) -> float:
        """FLOP a second of a device's products; 0 if that isn't known."""
        config = self.fit.config
        numbers = config.precision if dtype is None else f"fp{8 * dtype.itemsize}"
        return self.machines.device.speed(numbers, config.matmul_precision)

    @cached_property
    def dtype(self) -> np.dtype:
        """Number format of the sums."""
        return sum_dtype(self.fit.config)

    def _between(self, group: Group, weights: int) -> Stage:
        """The eigendecompositions, while the model stays where it is."""
        config, device = self.fit.config, self.machines.device
        sizes = config.chosen.matrix_sizes(self.fit.sites, config.method_options)
        statistics = self._between_bytes(group)
        each = EIGENDECOMPOSITION * max(sizes) ** 2
        at_once = int(SHARE * device.host_memory / each) if device.host_memory else 1
        at_once = max(
            1, min(device.cores or 1, at_once, math.ceil(len(sizes) / self.machines.hosts))
        )
        seconds = {}
        if device.cores:
            seconds["eigendecomposition"] = seconds_of(sizes, device.cores * self.machines.hosts)
        parts = {"model": weights, "statistics": statistics}
        return Stage(
            "Eigendecompositions", weights + statistics, parts,
            host_bytes=at_once * each, seconds=seconds,
        )  # fmt: skip

    def _between_bytes(self, group: Group) -> int:
        config = self.fit.config
        return config.chosen.between_bytes(
            group, config.method_options, self.dtype,
            devices=self.machines.count, hosts=self.machines.hosts,
        )  # fmt: skip

    def _largest_shape(self, tokens: int) -> tuple[int, int]:
        """Rows, on all devices, and length of the batch that has most positions."""
        shapes = self.fit.batches(tokens, self.machines.count).shapes
        return max(shapes, key=lambda shape: shape[0] * shape[1])
