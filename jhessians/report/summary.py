"""The closing summary of a run: what was computed, where it lies and what to do with it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

from jhessians.config import ComputeConfig
from jhessians.report.units import bytes_in_words, count_in_words, seconds_in_words

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
        modules: Number of linears with factors.
        documents: Documents in the data set.
        skipped_documents: Those of them under 2 tokens.
        positions: Positions processed, bergson's `total_processed`.
        devices: Such as "8 x cpu".
        timings: Seconds by stage, `Progress.timings`.
        trees: Every file tree written, see `measure_trees`.
        disk_bytes: Space taken on disk, hard links counted once.
        warnings: One line each.
        next_shell: A command that consumes the result, see `next_steps`.
        next_python: The same from Python.
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
    warnings: Sequence[str] = field(default_factory=tuple)
    next_shell: str = ""
    next_python: str = ""


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


def next_steps(
    config: ComputeConfig,
    *,
    model: str,
    dataset: str,
    shards: int,
    model_max_length: int | None = None,
) -> tuple[str, str]:
    """Commands that hand the factors to torch bergson 2.5.1.

    Args:
        config: The run's options.
        model: Name or folder of the model, the demo's too.
        dataset: The same for the data set.
        shards: Files per factor; `bergson ekfac` needs as many processes.
        model_max_length: Tokens that the model's positions allow; bergson refuses a larger
            token batch.

    Returns:
        A shell command that scores the data set against itself, and Python that loads the
        preconditioner. The command is empty with `--modules`, which bergson does not know: it
        would score the other modules without a preconditioner, in silence. Both are empty with
        `--layout seed`, which bergson 2.5.1 does not read.
    """
    python = (
        "from bergson.hessians.preconditioner import FactoredPreconditioner\n"
        f"FactoredPreconditioner.from_path({config.run_path!r}"
        + (", ev_correction=True)" if config.corrects_eigenvalues else ")")
    )
    if config.layout == "seed":
        return "", ""
    if config.modules:
        return "", python
    run_path = Path(config.run_path)
    method = config.bergson_method
    lines = []
    if run_path.parts[-2:] == ("hessian", method):
        scores = os.fspath(run_path.parent.parent)
    else:
        # bergson looks for the factors in RUN/hessian/<method>: lead it to ours.
        scores = f"{run_path}-scores"
        lines.append(f"mkdir -p {shlex.quote(f'{scores}/hessian')}")
        words = [shlex.quote(os.path.abspath(run_path)), shlex.quote(f"{scores}/hessian/{method}")]
        lines.append(_continued("ln -sfn", words))
    flags = _bergson_flags(config, model, dataset, model_max_length)
    flags["nproc_per_node"] = str(shards)
    words = [f"--{name} {shlex.quote(value)}" for name, value in flags.items()]
    lines.append(_continued(f"bergson ekfac {shlex.quote(scores)}", words))
    return "\n".join(lines), python


def _bergson_flags(
    config: ComputeConfig, model: str, dataset: str, model_max_length: int | None
) -> dict[str, str]:
    """Flags of `bergson ekfac` by name, only those that its own defaults do not cover."""
    flags = {"method": config.bergson_method, "resume": "true", "model": model}
    flags |= {"data.dataset": dataset, "query.dataset": dataset}
    if config.corrects_eigenvalues:
        flags["hessian_cfg.ev_correction"] = "true"
    tokens = min(config.token_batch_size, model_max_length or config.token_batch_size)
    # name in bergson, value, bergson's default
    candidates: list[tuple[str, object, object]] = [
        ("revision", config.revision, None),
        ("tokenizer", config.tokenizer, None),
        ("index_cfg.precision", config.precision, "fp32"),
        ("loss_reduction", config.loss_reduction, "sum"),
        ("include_bias", config.include_bias, False),
        ("filter_modules", config.filter_modules, None),
        ("fsdp", config.fsdp, False),
        ("token_batch_size", tokens, 2048),
    ]
    for source in ("data", "query"):
        candidates += [
            (f"{source}.split", config.split, "train"),
            (f"{source}.subset", config.subset, None),
            (f"{source}.prompt_column", config.prompt_column, "text"),
            (f"{source}.completion_column", config.completion_column, ""),
            (f"{source}.conversation_column", config.conversation_column, ""),
            (f"{source}.truncation", config.truncation, False),
            (f"{source}.chunk_length", config.chunk_length, 0),
        ]
    for name, value, default in candidates:
        if value != default:
            flags[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return flags


def _continued(head: str, words: Sequence[str]) -> str:
    """A shell command over several lines, each short enough for `render`'s indent."""
    lines = [head]
    for word in words:
        if len(lines[-1]) + len(word) + 1 > WIDTH - 6:
            lines.append("    " + word)
        else:
            lines[-1] += " " + word
    return " \\\n".join(lines)


def render(summary: Summary) -> str:
    """The summary as text for a terminal of 80 columns; only paths may run over."""
    total = sum(summary.timings.values())
    documents = count_in_words(summary.documents, "document")
    if summary.skipped_documents:
        documents += f" ({summary.skipped_documents:,} skipped: under 2 tokens)"
    facts = {
        "modules": f"{summary.modules:,}",
        "data": f"{documents}, {count_in_words(summary.positions, 'position')}",
        "devices": summary.devices,
        "time": seconds_in_words(total),
    }
    lines = [f"{summary.method} factors are in {summary.run_path}", ""]
    lines += [f"  {name:<9}{value}" for name, value in facts.items()]
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
