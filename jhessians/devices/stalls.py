"""Whether the processes of a run hang, and who keeps the others waiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jhessians.devices.place import Place

SILENT = 0.5
"""Part of the time without a move after which a process that doesn't report is silent."""


@dataclass
class Seen:
    """What is known of a process.

    Attributes:
        place: Where it was last.
        heard: When it said so, in seconds of this process's clock.
        moved: When it had last moved.
    """

    place: Place
    heard: float
    moved: float = 0.0

    def __post_init__(self) -> None:
        self.moved = self.heard

    def update(self, place: Place, now: float) -> None:
        """Take up a report.

        Args:
            place: Where the process is.
            now: When it says so.
        """
        if place.moves != self.place.moves:
            self.moved = now
        self.place, self.heard = place, now


def stalled(
    seen: Mapping[int, Seen], now: float, seconds: float, name_of: Callable[[int], str]
) -> str | None:
    """What to say if nothing has moved anywhere for too long.

    Args:
        seen: By the process's number.
        now: In seconds of the same clock.
        seconds: How long is too long.
        name_of: A process in words.

    Returns:
        Which process is silent, hangs in work of its own, or is behind, and where; None if there is
        one that moved.
    """
    if any(now - each.moved <= seconds for each in seen.values()):
        return None
    silent = [i for i, each in seen.items() if now - each.heard > SILENT * seconds]
    hanging = [i for i, each in seen.items() if i not in silent and not each.place.waits]
    others = [i for i in seen if i not in silent and i not in hanging]
    said = [
        *(f"{name_of(i)} is silent since {seen[i].place}" for i in silent),
        *(f"{name_of(i)} hangs in {seen[i].place}" for i in hanging),
    ]
    waiting: dict[str, list[int]] = {}
    for i in others:
        waiting.setdefault(str(seen[i].place), []).append(i)
    # The most wait together; those that wait elsewhere have gone another way.
    for place, numbers in sorted(waiting.items(), key=lambda item: len(item[1])):
        names = name_of(numbers[0]) if len(numbers) == 1 else f"{len(numbers)} processes"
        said.append(f"{names} wait{'s' * (len(numbers) == 1)} in {place}")
    return (
        f"no process of this run has moved for {_minutes(seconds)} (`timeout_minutes`): "
        f"{', '.join(said[:4])}; see that machine and its own messages, and run again"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
