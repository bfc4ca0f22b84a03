"""What the runs say: medians, ratios, the arithmetic bound, as Markdown, JSON and a picture."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import models
from measure import CORRECTION, COVARIANCES, EIGEN, REST, STAGES, Run
from models import Arithmetic, Shape

ARITHMETIC: dict[str, Callable[[Shape, int], Arithmetic]] = {
    "jhessians": models.needed,
    "bergson": models.bergson_does,
    "kronfluence": models.kronfluence_does,
    "unsaved": models.needed,
}


@dataclass(frozen=True)
class Comparison:
    """One shape's measurements.

    Attributes:
        name: The preset, or the shape as typed.
        shape: Of the model.
        tokens: In all.
        chunk: Tokens per document.
        peaks: Library → float32 FLOP per second of a matrix product.
        runs: In the order in which they ran: every tool once, again and again.
        errors: Peer → factor → the largest relative difference to jhessians.
    """

    name: str
    shape: Shape
    tokens: int
    chunk: int
    peaks: dict[str, float]
    runs: list[Run]
    errors: dict[str, dict[str, float]]

    @property
    def tools(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(run.tool for run in self.runs))

    def of(self, tool: str) -> list[Run]:
        """A tool's runs."""
        return [run for run in self.runs if run.tool == tool]

    def seconds(self, tool: str, stage: str | None = None) -> float:
        """Median seconds, of a stage or of the whole."""
        return median(run.stages[stage] if stage else run.seconds for run in self.of(tool))

    def peak_bytes(self, tool: str) -> float:
        """Median peak memory."""
        return median(run.peak_bytes for run in self.of(tool))

    def speed(self, tool: str) -> float:
        """How many times jhessians' time a peer takes: the median over neighbouring runs."""
        pairs = zip(self.of(tool), self.of("jhessians"), strict=True)
        return median(theirs.seconds / ours.seconds for theirs, ours in pairs)

    @property
    def machine_peak(self) -> float:
        """The fastest library's."""
        return max(self.peaks.values())

    def bound(self, tool: str) -> float:
        """The speed over a peer that no plain float32 implementation exceeds.

        The needed arithmetic at the machine's peak, and of the peer's own time what is no pass
        over the data: eigendecompositions, start-up, loading and writing.
        """
        needed = models.needed(self.shape, self.chunk)
        passes = (needed.covariance + needed.correction) * self.tokens / self.machine_peak
        others = self.seconds(tool, EIGEN) + self.seconds(tool, REST)
        return self.seconds(tool) / (passes + others)

    def share_of_peak(self, tool: str, stage: str, flop: Arithmetic) -> float:
        """Part of the machine's peak that a pass reaches, counting `flop` per token."""
        per_token = flop.covariance if stage == COVARIANCES else flop.correction
        return per_token * self.tokens / self.seconds(tool, stage) / self.machine_peak


@dataclass(frozen=True)
class Record:
    """A whole benchmark, and what is needed to repeat it."""

    machine: str
    versions: dict[str, str]
    command: str
    comparisons: list[Comparison]


def describe_machine() -> str:
    """Processor, cores and memory, and a GPU if there is one."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if "model name" in line]
        processor = names[0].partition(":")[2].strip() if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    words = f"{processor}, {cores} cores, {memory:.0f} GB, Python {platform.python_version()}"
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
        return f"{words}, {', '.join(filter(None, gpus))}"
    except (OSError, subprocess.CalledProcessError):
        return words


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _time_rows(c: Comparison) -> Iterator[list[str]]:
    for tool in c.tools:
        peer = tool != "jhessians"
        yield [
            tool,
            f"{c.seconds(tool):.1f}",
            f"{median(run.cpu_seconds for run in c.of(tool)):.1f}",
            *(f"{c.seconds(tool, stage):.1f}" for stage in (*STAGES, REST)),
            f"{c.peak_bytes(tool) / 1e9:.2f}",
            f"**{c.speed(tool):.2f}x**" if peer else "",
            f"{c.bound(tool):.2f}x" if peer else "",
            f"{c.peak_bytes('jhessians') / c.peak_bytes(tool):.2f}x" if peer else "",
        ]


def _arithmetic_rows(c: Comparison) -> Iterator[list[str]]:
    needed = models.needed(c.shape, c.chunk)
    for tool in c.tools:
        does = ARITHMETIC[tool](c.shape, c.chunk)
        row = [tool, f"{does.covariance / 1e6:.0f}", f"{does.correction / 1e6:.0f}"]
        for stage in (COVARIANCES, CORRECTION):
            row.append(f"{c.share_of_peak(tool, stage, needed):.0%}")
            row.append(f"{c.share_of_peak(tool, stage, does):.0%}")
        yield row


def markdown(record: Record) -> str:
    """The whole result as a page."""
    lines = [
        "# Whole EKFAC fits, side by side",
        "",
        f"- machine: {record.machine}",
        f"- versions: {', '.join(f'{name} {v}' for name, v in record.versions.items())}",
        f"- command: `{record.command}`",
        "",
        "Seconds are medians of whole processes, imports and compilation included; memory is the "
        "peak resident size. Speed is a peer's time over jhessians', the median over neighbouring "
        "runs. The bound is the same ratio for a fit that does only the needed arithmetic, at the "
        "machine's peak, and spends as long as the peer outside the two passes. Seconds of CPU are "
        "summed over the cores.",
    ]
    for c in record.comparisons:
        repeats = len(c.runs) // len(c.tools)
        loads = [run.load_before for run in c.runs]
        peaks = ", ".join(f"{name} {peak / 1e9:.0f}" for name, peak in c.peaks.items())
        time_header = ["tool", "seconds", "of CPU", *STAGES, REST, "peak GB"]
        time_header += ["speed", "bound", "memory"]
        flop_header = ["tool", "covariances: MFLOP per token", "correction"]
        for stage in (COVARIANCES, CORRECTION):
            flop_header += [f"{stage}: needed, of peak", "done, of peak"]
        error_header = ["jhessians against", *next(iter(c.errors.values()))]
        error_rows = [
            [peer, *(f"{error:.1e}" for error in found.values())]
            for peer, found in c.errors.items()
        ]
        lines += [
            "",
            f"## {c.name}: (width, layers, inner, vocabulary) = ({c.shape}), {c.tokens:,} tokens "
            f"in chunks of {c.chunk}, {repeats} runs each",
            "",
            table(time_header, list(_time_rows(c))),
            "",
            f"Float32 matrix product, GFLOP/s: {peaks}. Arithmetic, with the share of the fastest "
            "that each pass reaches, counting what is needed and what the tool's way does (for "
            "jhessians what is needed):",
            "",
            table(flop_header, list(_arithmetic_rows(c))),
            "",
            "Largest relative difference over all modules:",
            "",
            table(error_header, error_rows),
            "",
            f"Load average before a run: {min(loads):.1f} to {max(loads):.1f} (a run of the tools "
            "themselves leaves some).",
        ]
    return "\n".join(lines) + "\n"


def write(record: Record, folder: Path) -> list[str]:
    """Write the page, its numbers and a picture; say what was written.

    Args:
        record: All results.
        folder: Made if missing; files of the same shapes are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = "_".join(c.name.replace(",", "-") for c in record.comparisons)
    numbers = asdict(record) | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    (folder / f"{stem}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    page, picture = folder / f"{stem}.md", folder / f"{stem}.png"
    drawn = _draw(record, picture)
    page.write_text(markdown(record) + (f"\n![seconds per stage]({stem}.png)\n" if drawn else ""))
    said = [f"wrote {stem}.json and {stem}.md to {folder}"]
    said.append(f"wrote {picture.name}" if drawn else "no picture: matplotlib is not installed")
    return said


def _draw(record: Record, file: Path) -> bool:
    """Stacked bars of seconds per stage; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    count = len(record.comparisons)
    figure, axes = pyplot.subplots(1, count, figsize=(1.2 + 3.2 * count, 3.8), squeeze=False)
    for axis, c in zip(axes[0], record.comparisons, strict=True):
        base = [0.0] * len(c.tools)
        for stage in (*STAGES, REST):
            heights = [c.seconds(tool, stage) for tool in c.tools]
            axis.bar(c.tools, heights, bottom=base, label=stage, width=0.65)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        for place, tool in enumerate(c.tools):
            axis.text(place, base[place], f"{c.peak_bytes(tool) / 1e9:.2f} GB",
                      ha="center", va="bottom", fontsize=8)  # fmt: skip
        axis.set_title(f"{c.name}\n({c.shape}), {c.tokens:,} tokens", fontsize=9)
        axis.margins(y=0.1)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    return True
