"""The table and the file of `--profile`: seconds, arithmetic and memory of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jhessians.config.units import bytes_in_words

PROFILE_FILE = "profile.json"


@dataclass(frozen=True)
class StageProfile:
    """What one stage took, all of its parts together.

    Attributes:
        name: As progress shows it.
        seconds: From start to end, compilation included.
        compile_seconds: Of which XLA's compiler or its cache on disk took.
        flop: What the stage needed (`jhessians.fitting.arithmetic`); None where products aren't
            what it does.
        written_bytes: By which the run's folder grew, hard links counted once.
        memory_bytes: The process's largest resident size meanwhile.
        device_bytes: The largest of one device's memory so far; None where JAX doesn't know.
    """

    name: str
    seconds: float
    compile_seconds: float
    flop: float | None
    written_bytes: int
    memory_bytes: int
    device_bytes: int | None = None

    @property
    def rate(self) -> float | None:
        """FLOP per second."""
        return self.flop / self.seconds if self.flop and self.seconds else None


@dataclass(frozen=True)
class Profile:
    """A run's stages, and what its devices can do.

    Attributes:
        stages: In order.
        peak: FLOP per second of large matrix products on all devices.
        numbers: What was multiplied for it, such as "fp32".
        matmul_precision: And how.
        devices: Such as "8 x cpu".
        tokens: In all documents that have two or more.
        padding_share: Of the computed positions.
    """

    stages: Sequence[StageProfile]
    peak: float
    numbers: str
    matmul_precision: str
    devices: str
    tokens: int
    padding_share: float

    def share_of_peak(self, stage: StageProfile) -> float | None:
        """Part of the peak that the needed arithmetic comes to over the stage's whole time."""
        return stage.rate / self.peak if stage.rate else None

    def document(self) -> dict[str, Any]:
        """All of `profile.json`."""
        stages = [
            asdict(each) | {"flop_per_second": each.rate, "share_of_peak": self.share_of_peak(each)}
            for each in self.stages
        ]
        return {**asdict(self), "stages": stages}

    def lines(self) -> list[str]:
        """The table, 80 columns wide."""
        unit, size = ("GFLOP", 1e9) if self.peak < 1e12 else ("TFLOP", 1e12)
        header = ("seconds", "compile", unit, f"{unit}/s", "peak", "written", "memory")
        rows = [_row("", header)]
        rows += [_row(each.name, self._cells(each, size)) for each in self.stages]
        device = max((each.device_bytes or 0 for each in self.stages), default=0)
        notes = [
            f"peak: {self.peak / size:,.0f} {unit}/s, products of {self.numbers} numbers, "
            f"{self.matmul_precision}, on {self.devices}",
            f"{unit}: what the algorithm needs, without padding and what is computed twice",
        ]
        if device:
            notes.append(f"peak memory of a device: {bytes_in_words(device)}")
        return ["  Profile", *rows, *(f"  {note}" for note in notes)]

    def _cells(self, stage: StageProfile, size: float) -> tuple[str, ...]:
        rate, share = stage.rate, self.share_of_peak(stage)
        return (
            f"{stage.seconds:,.1f}",
            f"{stage.compile_seconds:,.1f}",
            f"{stage.flop / size:,.0f}" if stage.flop else "-",
            f"{rate / size:,.0f}" if rate else "-",
            f"{share:.0%}" if share else "-",
            bytes_in_words(stage.written_bytes) if stage.written_bytes else "-",
            bytes_in_words(stage.memory_bytes),
        )


def _row(name: str, cells: Sequence[str]) -> str:
    widths = (8, 8, 9, 8, 5, 9, 9)
    return f"  {name:<22}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
    )
