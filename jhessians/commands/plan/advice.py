"""What to change in a fit that doesn't fit its machines, or that makes little of them."""

from __future__ import annotations

from dataclasses import replace

from jhessians.commands.plan.planner import Planner
from jhessians.config.units import bytes_in_words
from jhessians.fitting.partitions import unit_count
from jhessians.planning.plan import Plan

ROOM = 2
"""A batch so many times as large is worth a word, where the network takes more than one part in so
many of the rest's time."""


def advise(planner: Planner, plan: Plan) -> list[str]:
    """Sentences for a reader.

    Args:
        planner: Of the plan, to try other choices.
        plan: The fit.

    Returns:
        One for each thing to change; none if all is well.
    """
    if not plan.fits:
        return _make_it_fit(planner, plan)
    network = sum(stage.seconds.get("network", 0.0) for stage in plan.stages)
    others = sum(
        max((time for what, time in stage.seconds.items() if what != "network"), default=0.0)
        for stage in plan.stages
    )
    if network <= others / ROOM:
        return []
    largest = planner.largest_batch(planner.largest_group(plan.partitions))
    if largest is None or largest < ROOM * plan.token_batch_size:
        return []
    return [
        f"--token_batch_size {largest} fits, too, and would divide the traffic between devices by "
        f"{largest / plan.token_batch_size:.3g}: a step's doesn't grow with its tokens"
    ]


def _make_it_fit(planner: Planner, plan: Plan) -> list[str]:
    """What would make the fit smaller, the cheapest first."""
    if plan.peak <= plan.budget:
        return [
            "a host's memory is too small for one eigendecomposition of the largest matrix; take "
            "hosts with more"
        ]
    found: list[str] = []
    config = planner.fit.config
    largest = planner.largest_batch(
        planner.largest_group(plan.partitions), most=plan.token_batch_size // 2
    )
    if largest is not None:
        return [f"--token_batch_size {largest} would fit"]
    if not config.fsdp and plan.machines.count > 1:
        spread = replace(planner.fit, config=replace(config, fsdp=True))
        less = Planner(spread, plan.machines).peak(
            planner.largest_group(plan.partitions), plan.token_batch_size
        )
        fits = "would fit" if less <= plan.budget else "would help"
        found.append(f"--fsdp {fits}: {bytes_in_words(less)} a device")
        if less <= plan.budget:
            return found
    tokens = min(plan.token_batch_size, int(planner.fit.lengths.max()))
    if config.chosen.factored and plan.partitions < unit_count(planner.fit.sites):
        count = planner.fewest_partitions(tokens)
        if planner.peak(planner.largest_group(count), tokens) <= plan.budget:
            batch = f" --token_batch_size {tokens}" if tokens < plan.token_batch_size else ""
            found.append(
                f"--module_partitions {count}{batch} would fit, with {count} times the passes"
            )
            return found
    return [*found, "Take more devices, or devices with more memory"]
