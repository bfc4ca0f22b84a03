"""The plan of a fit: what each of its stages takes of which machines, and which limit it meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jhessians.planning.hardware import SHARE_OF_MEMORY, Machines
from jhessians.planning.steps import Step

SHARE_OF_PEAK = 0.5
"""Of a device's peak, what its products reach in whole passes. On CPUs 0.4 to 0.8 were measured."""


@dataclass(frozen=True)
class Stage:
    """One stage of a fit, all groups of modules together.

    Attributes:
        name: As progress shows it.
        device_bytes: The most that a device holds, of the largest group.
        parts: What that is made of, in bytes.
        host_bytes: The most that a host's own memory holds.
        flop: What the algorithm needs on all devices.
        sent: Bytes that each device sends.
        seconds: By what takes them, `compute`, `memory`, `network`, `eigendecomposition`; without
            those that aren't known.
    """

    name: str
    device_bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)
    host_bytes: int = 0
    flop: float = 0.0
    sent: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> str:
        """What takes longest; a dash if nothing is known."""
        return max(self.seconds, key=lambda name: self.seconds[name], default="-")

    @property
    def time(self) -> float:
        """Seconds, if traffic and arithmetic go on side by side."""
        return max(self.seconds.values(), default=0.0)


@dataclass(frozen=True)
class Plan:
    """A fit that has not begun.

    Attributes:
        machines: On which it is to run.
        budget: Bytes that a device has for it.
        stages: In order.
        partitions: Groups of modules, fitted one after the other.
        token_batch_size: Tokens that a device takes at once.
        activations: Whether they are stored or recomputed.
        steps: Of each pass.
        tokens: In the data.
        parameters: Of the model.
        disk: Bytes of the results.
    """

    machines: Machines
    budget: int
    stages: Sequence[Stage]
    partitions: int
    token_batch_size: int
    activations: str
    steps: int
    tokens: int
    parameters: int
    disk: int

    @property
    def peak(self) -> int:
        """Bytes of a device at the fullest moment of all stages."""
        return max(stage.device_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every device and, as far as it is known, every host has memory enough."""
        host = self.machines.device.host_memory
        hosts = max(stage.host_bytes for stage in self.stages)
        return self.peak <= self.budget and (not host or hosts <= host)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.time for stage in self.stages)


def budget_of(machines: Machines) -> int:
    """Bytes that programs get of each device."""
    return int(machines.device.memory * SHARE_OF_MEMORY)


def pass_stage(
    name: str,
    steps_of_groups: Sequence[Step],
    machines: Machines,
    *,
    work: Sequence[tuple[float, float]],
    steps: int,
    padding_share: float,
) -> Stage:
    """A pass over the data.

    Args:
        name: Of the stage.
        steps_of_groups: A step on one device, of each group of modules.
        machines: On which.
        work: FLOP that are needed on all devices, for all groups, and FLOP a second at which a
            device does them, 0 if that isn't known; the model's part and the fold's.
        steps: Of each group's pass.
        padding_share: Of the computed positions.

    Returns:
        Memory of the largest group; traffic and time of all.
    """
    largest = max(steps_of_groups, key=lambda step: step.peak)
    device = machines.device
    sent = steps * sum(step.sent for step in steps_of_groups)
    seconds: dict[str, float] = {}
    if all(speed for _, speed in work):
        busy = sum(flop / speed for flop, speed in work) / machines.count
        seconds["compute"] = busy / SHARE_OF_PEAK / (1 - padding_share)
    if device.bandwidth:
        moved = steps * sum(step.moved for step in steps_of_groups)
        seconds["memory"] = moved / device.bandwidth
    if device.link and machines.count > 1:
        over_hosts = machines.hosts > 1 and device.network
        seconds["network"] = sent / (device.network if over_hosts else device.link)
    parts = {
        "model": largest.weights, "statistics": largest.statistics, "temporary": largest.temporary,
    }  # fmt: skip
    needed = sum(flop for flop, _ in work)
    return Stage(name, largest.peak, parts, 0, needed, sent, seconds)
