"""What the runs of scaling.py say: seconds per token, memory, seconds to the first steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import report
from measure import CORRECTION, COVARIANCES, Run
from models import Shape

PASSES = {COVARIANCES: "Covariances", CORRECTION: "Eigenvalue correction"}
FIRST_STEPS = "first steps"
# The empty line is the start; the stage's first line after its title ends with no "...".
STARTED = {FIRST_STEPS: ("^$", rf"^{PASSES[COVARIANCES]}: (\d+ %|.* in \d)")}
CACHES = {"empty": 10, "left by the run before": 5}
"""Compilation cache → seconds to the first step that we aim at."""


@dataclass(frozen=True)
class Fit:
    """What one fit took.

    Attributes:
        tokens: In all.
        seconds: Of the whole process, the profile's own products included.
        passes: Pass → seconds, without `compile_seconds`.
        compile_seconds: Of both passes, compiling or finding what is compiled.
        peak_bytes: Largest resident memory of any stage.
        load_before: As `Run`'s.
    """

    tokens: int
    seconds: float
    passes: dict[str, float]
    compile_seconds: float
    peak_bytes: int
    load_before: float


@dataclass(frozen=True)
class Record:
    """A whole run of scaling.py; `starts` has the runs of each cache, by its words in `CACHES`."""

    machine: str
    versions: dict[str, str]
    command: str
    shape: Shape
    chunk: int
    batch: int
    fits: list[Fit]
    starts: dict[str, list[Run]]

    def median(self, tokens: int, of: Callable[[Fit], float]) -> float:
        """Over the fits of one size."""
        return median(of(fit) for fit in self.fits if fit.tokens == tokens)


def read_profile(tokens: int, run: Run, profile: dict) -> Fit:
    """One fit, from its process and its profile.json.

    `Run.peak_bytes` won't do: the profile makes the system forget earlier peaks, and multiplies
    large matrices at the end.
    """
    stages = {stage["name"]: stage for stage in profile["stages"]}
    compiling = {name: stages[title]["compile_seconds"] for name, title in PASSES.items()}
    passes = {name: stages[title]["seconds"] - compiling[name] for name, title in PASSES.items()}
    peak = max(stage["memory_bytes"] for stage in stages.values())
    return Fit(tokens, run.seconds, passes, sum(compiling.values()), peak, run.load_before)


def growth_rows(record: Record) -> Iterator[list[str]]:
    """A row for each size: both passes per 1,000 tokens, whole time, memory, over the first's."""
    sizes = sorted({fit.tokens for fit in record.fits})
    peaks = [record.median(size, lambda fit: fit.peak_bytes) for size in sizes]

    def seconds(name: str) -> list[float]:
        return [record.median(size, lambda fit: fit.passes[name]) for size in sizes]

    passes = {name: seconds(name) for name in PASSES}
    for i, size in enumerate(sizes):
        row = [f"{size:,}"]
        for took in passes.values():
            rate = took[i] / size
            added = (took[i] - took[i - 1]) / (size - sizes[i - 1]) if i else None
            row += [f"{1000 * rate:.3f}", f"{rate / took[0] * sizes[0]:.2f}x"]
            row.append(f"{1000 * added:.3f}" if added is not None else "")
        row.append(f"{record.median(size, lambda fit: fit.seconds):.1f}")
        yield [*row, f"{peaks[i] / 1e9:.2f}", f"{peaks[i] / peaks[0]:.2f}x"]


def start_rows(record: Record) -> Iterator[list[str]]:
    """A row for each cache."""
    for name, runs in record.starts.items():
        seconds = [run.stages[FIRST_STEPS] for run in runs]
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        whole = median(run.seconds for run in runs)
        yield [name, f"{median(seconds):.1f}", spread, f"{whole:.1f}", str(CACHES[name])]


def markdown(record: Record) -> str:
    """The result as a page."""
    header = ["tokens"]
    for name in PASSES:
        header += [f"{name}: s per 1,000 tokens", "over the first", "of those added"]
    header += ["s in all", "peak GB", "over the first"]
    starts = ["compilation cache", "s to the first steps", "from, to", "s in all", "goal"]
    loads = [fit.load_before for fit in record.fits]
    loads += [run.load_before for runs in record.starts.values() for run in runs]
    return PAGE.format(
        machine=record.machine, command=record.command, shape=record.shape,
        versions=", ".join(f"{name} {version}" for name, version in record.versions.items()),
        chunk=record.chunk, batch=record.batch,
        repeats=len(next(iter(record.starts.values()))),
        growth=report.table(header, list(growth_rows(record))),
        starts=report.table(starts, list(start_rows(record))),
        low=min(loads), high=max(loads),
    )  # fmt: skip


PAGE = """\
# Growth with tokens, and start-up

- machine: {machine}
- versions: {versions}
- command: `{command}`
- runs: medians of {repeats} each, in turn; load average before a run: {low:.1f} to {high:.1f} (the
  runs themselves leave some)

## Growth

Whole EKFAC fits of (width, layers, inner, vocabulary) = ({shape}), chunks of {chunk} tokens,
{batch:,} tokens per step. A run beforehand, not counted, leaves its compilations to all; what a
pass still takes to find them is taken out, as `--profile` tells. "Of those added" counts only the
tokens that the row above lacks, and so nothing that every fit pays once. Seconds in all are those
of the process, with the 2 seconds that `--profile` takes at the end. Memory is the largest
resident size during any stage. Goals: per token at most 1.05 times the first row's seconds, and
memory that doesn't grow.

{growth}

## Start-up

`python -m jhessians compute OUT`, the embedded demo: from the start of the process to the first
line of progress inside the covariance pass. That line is printed once a tenth of the positions is
done, not at the first finished step but perhaps a few later: the seconds are never too few.

{starts}
"""
