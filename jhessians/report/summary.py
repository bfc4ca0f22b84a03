"""The closing summary of a run: what was computed, where it lies and how long it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

from jhessians.config.units import bytes_in_words, count_in_words, seconds_in_words
from jhessians.report.profile import Profile

WIDTH = 80


@dataclass(frozen=True)
class Tree:
    """A folder (or the loose files) that a run wrote.

    Attributes:
        path: Name relative to the run's folder.
        files: Number of files, at any depth.
        bytes: Their size as a reader of this tree sees it.
        shared_bytes: The part that takes no space of its own, being hard links into a tree
            that is listed earlier.
    """

    path: str
    files: int
    bytes: int
    shared_bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """What `render` says of a finished run.

    Attributes:
        run_path: Folder with the results.
        method: As typed after `--method`.
        modules: Number of linears recorded.
        documents: Documents in the data set.
        skipped_documents: Those of them under 2 tokens.
        positions: Positions processed, bergson's `total_processed`.
        devices: Such as "8 x cpu".
        timings: Seconds by stage, `Progress.timings`.
        trees: Every file tree written, see `measure_trees`.
        disk_bytes: Space taken on disk, hard links counted once.
        padding_share: Share of computed positions that hold no token, `BatchPlan.padding_share`.
        product: What was fitted, in the plural.
        coverage: Which share of the parameters is recorded, and what is passed over and why, a
            line each.
        spectrum: What the factors' eigenvalues say, a line each.
        notes: Lines that were said on the way; they are not said again.
        number_format: Of the model, such as "float32, stored in bfloat16".
        warnings: One line each.
        next_shell: A command that consumes the result, see `jhessians.commands.compute.next_steps`.
        next_python: The same from Python.
        profile: Of `--profile`.
        facts: Further lines of the table at the top, by name.
    """

    run_path: str
    method: str
    modules: int
    documents: int
    skipped_documents: int
    positions: int
    devices: str
    timings: Mapping[str, float]
    trees: Sequence[Tree]
    disk_bytes: int
    padding_share: float = 0.0
    product: str = "factors"
    coverage: Sequence[str] = field(default_factory=tuple)
    spectrum: Sequence[str] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)
    number_format: str = ""
    warnings: Sequence[str] = field(default_factory=tuple)
    next_shell: str = ""
    next_python: str = ""
    profile: Profile | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def measure_trees(run_path: str | Path) -> tuple[list[Tree], int]:
    """Walk a finished run's folder.

    Returns:
        One `Tree` per subfolder, by name, then one for the loose files beside them; and the
        bytes on disk, where hard links count once.
    """
    root = Path(run_path)
    seen: set[tuple[int, int]] = set()
    entries = sorted(root.iterdir())
    trees = []
    for entry in entries:
        if entry.is_dir():
            files = (each for each in sorted(entry.rglob("*")) if each.is_file())
            trees.append(_measure(f"{entry.name}/", files, seen))
    loose = [entry for entry in entries if entry.is_file()]
    if loose:
        trees.append(_measure(", ".join(entry.name for entry in loose), loose, seen))
    return trees, sum(tree.bytes - tree.shared_bytes for tree in trees)


def _measure(name: str, files: Iterable[Path], seen: set[tuple[int, int]]) -> Tree:
    count = size = shared = 0
    for file in files:
        status = file.stat()
        identity = (status.st_dev, status.st_ino)
        count += 1
        size += status.st_size
        shared += status.st_size if identity in seen else 0
        seen.add(identity)
    return Tree(name, count, size, shared)


def render(summary: Summary) -> str:
    """The summary as text for a terminal of 80 columns; only paths may run over."""
    total = sum(summary.timings.values())
    documents = count_in_words(summary.documents, "document")
    if summary.skipped_documents:
        documents += f" ({summary.skipped_documents:,} skipped: under 2 tokens)"
    facts = {
        "modules": f"{summary.modules:,}",
        "data": f"{documents}, {count_in_words(summary.positions, 'position')}",
        "padding": f"{summary.padding_share:.1%} of the positions that are computed",
        "devices": summary.devices,
        "model": summary.number_format,
        "time": seconds_in_words(total),
    } | dict(summary.facts)
    lines = [f"{summary.method} {summary.product} are in {summary.run_path}", ""]
    width = max(map(len, facts)) + 2
    lines += [f"  {name:<{width}}{value}" for name, value in facts.items() if value]
    for title, said in (("Parameters", summary.coverage), ("Spectrum", summary.spectrum)):
        if said:
            lines += ["", f"  {title}"]
        for line in said:
            lines += wrap(line, WIDTH, initial_indent="    ", subsequent_indent="      ")
    if summary.timings:
        lines += ["", "  Time per stage"]
        lines += _stage_rows(summary.timings)
    lines += ["", f"  Files, {bytes_in_words(summary.disk_bytes)} on disk"]
    lines += _tree_rows(summary.trees)
    if summary.warnings:
        lines += ["", "  Warnings"]
        for warning in summary.warnings:
            lines += wrap(warning, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    for title, code in (
        ("Next, score the data with torch bergson", summary.next_shell),
        ("Or load them in Python", summary.next_python),
    ):
        if code:
            lines += ["", f"  {title}"]
            lines += [f"    {line}" for line in code.splitlines()]
    if summary.profile:
        lines += ["", *summary.profile.lines()]
    return "\n".join(line.rstrip() for line in lines)


def _stage_rows(timings: Mapping[str, float]) -> list[str]:
    total = sum(timings.values()) or 1.0
    name_width = min(40, max(len(name) for name in timings))
    return [
        f"    {name:<{name_width}}  {seconds_in_words(seconds):>12}  {seconds / total:>5.0%}"
        for name, seconds in timings.items()
    ]


def _tree_rows(trees: Sequence[Tree]) -> list[str]:
    # The loose files' row lists names and may be long; it wraps under itself.
    names = [wrap(tree.path, 36, break_on_hyphens=False) or [""] for tree in trees]
    width = max((len(line) for name in names for line in name), default=0)
    rows = []
    for tree, (first, *rest) in zip(trees, names, strict=True):
        files = count_in_words(tree.files, "file")
        row = f"    {first:<{width}}  {files:>11}  {bytes_in_words(tree.bytes):>9}"
        if tree.shared_bytes:
            share = bytes_in_words(tree.shared_bytes)
            whole = tree.shared_bytes == tree.bytes
            row += "  shared" if whole else f"  {share} shared"
        rows.append(row)
        rows += [f"    {line}" for line in rest]
    return rows
