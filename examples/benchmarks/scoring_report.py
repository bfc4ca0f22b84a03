"""What the runs of scoring.py say: seconds, memory and agreement, as Markdown and JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import report
from measure import Run
from scoring_agreement import Agreement


@dataclass(frozen=True)
class Comparison:
    """One task of one shape.

    Attributes:
        shape: Its name, a key of `Record.shapes`.
        task: A number of queries, "tokens" or "self".
        runs: In the order in which they ran: every tool once, again and again.
        agreement: Peer → how far its scores and jhessians' agree.
        notes: What a reader has to know.
    """

    shape: str
    task: str
    runs: list[Run]
    agreement: dict[str, Agreement]
    notes: list[str]

    @property
    def tools(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(run.tool for run in self.runs))

    def of(self, tool: str) -> list[Run]:
        """A tool's runs."""
        return [run for run in self.runs if run.tool == tool]

    def speed(self, tool: str) -> float:
        """How many times jhessians' time a peer takes: the median over neighbouring runs."""
        pairs = zip(self.of(tool), self.of("jhessians"), strict=True)
        return median(theirs.seconds / ours.seconds for theirs, ours in pairs)


@dataclass(frozen=True)
class Record:
    """A whole benchmark, and what is needed to repeat it; `shapes` describes each by its name."""

    machine: str
    versions: dict[str, str]
    command: str
    shapes: dict[str, str]
    memory_gb: float
    comparisons: list[Comparison]


def rows(comparisons: list[Comparison]) -> Iterator[list[str]]:
    """A row for each task and tool."""
    for c in comparisons:
        ours = median(run.peak_bytes for run in c.of("jhessians"))
        for tool in c.tools:
            runs = c.of(tool)
            peak = median(run.peak_bytes for run in runs)
            row = [
                c.task if tool == "jhessians" else "",
                tool,
                f"{median(run.seconds for run in runs):.1f}",
                f"{median(run.cpu_seconds for run in runs):.1f}",
                f"{peak / 1e9:.2f}",
            ]
            if tool in c.agreement:
                found = c.agreement[tool]
                row += [f"**{c.speed(tool):.2f}x**", f"{ours / peak:.2f}x"]
                row += [f"{found.difference:.1e}", f"{found.ranks:.6f}"]
            yield row + [""] * (9 - len(row))


def markdown(record: Record) -> str:
    """The result as a page."""
    header = ["queries", "tool", "seconds", "of CPU", "peak GB"]
    header += ["speed", "memory", "difference", "ranks"]
    loads = [run.load_before for c in record.comparisons for run in c.runs]
    parts = []
    for name, described in record.shapes.items():
        own = [c for c in record.comparisons if c.shape == name]
        repeats = len(own[0].of("jhessians"))
        title = f"## {name}: (width, layers, inner, vocabulary) = {described}, {repeats} runs each"
        parts.append(f"{title}\n\n{report.table(header, list(rows(own)))}\n")
        notes = [f"- {c.task}: {note}" for c in own for note in c.notes]
        if notes:
            parts.append("\n".join(notes) + "\n")
    return PAGE.format(
        machine=record.machine,
        versions=", ".join(f"{name} {version}" for name, version in record.versions.items()),
        command=record.command,
        memory=record.memory_gb,
        low=min(loads),
        high=max(loads),
        shapes="\n".join(parts),
    )


def write(record: Record, folder: Path) -> str:
    """Write the page and its numbers; say what was written.

    Args:
        record: All results.
        folder: Made if missing; files of the same shapes are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = "scoring-" + "_".join(name.replace(",", "-") for name in record.shapes)
    numbers = asdict(record) | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    (folder / f"{stem}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(markdown(record))
    return f"wrote {stem}.json and {stem}.md to {folder}"


PAGE = """\
# Influence scores, side by side

- machine: {machine}
- versions: {versions}
- command: `{command}`
- load average before a run: {low:.1f} to {high:.1f} (the runs themselves leave some)

Every tool finds its fit: jhessians and bergson the same one, kronfluence one of its own. Seconds
are medians of whole processes, imports and compilation included; memory is the peak resident size.
Speed is a peer's time over jhessians', the median over neighbouring runs; memory is jhessians' over
the peer's. Every tool holds up to {memory:g} GB of queries' gradients at once. Difference is the
largest one between jhessians' and the peer's scores over the query's largest score, ranks the
Spearman correlation over what is scored, both of the query on which they agree least. `tokens`
gives each token of every document a score for one query; `self` is each document's score for
itself.

{shapes}"""
