"""What `score` does: queries through the inverse Hessian, a pass over the data, and its results."""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute, is_first_host
from jhessians.commands.score.config import NONE, ScoreConfig
from jhessians.commands.score.listing import (
    HARMFUL,
    HELPFUL,
    QUERIES_SHOWN,
    ranking_lines,
    retrieval,
)
from jhessians.commands.score.results import Results, write_columns
from jhessians.commands.score.work import Work, prepare
from jhessians.config.option import name_flags, options_of
from jhessians.config.provenance import CONFIG_FILE, config_document
from jhessians.config.units import count_in_words, seconds_in_words
from jhessians.data.selecting import Column, ColumnBatches, columns_of
from jhessians.devices.hosts import start_hosts, together
from jhessians.devices.memory import free_memory
from jhessians.devices.mesh import make_mesh
from jhessians.devices.precision import require_supported
from jhessians.influence.queries import QueryGroup, QueryPass, query_bytes
from jhessians.influence.scoring import BatchScores, ScorePass, module_names, normalized
from jhessians.interop.rundir import RunDirectory
from jhessians.interop.score_store import ScoreStore
from jhessians.report.progress import Progress

SHARE = 0.5
"""Of the memory that is free beside model and Hessian, what queries may take."""

QUERIES_AT_ONCE = 16
"""So many parts of a group, at most, are made in one batch: its rows are in memory besides."""

HESSIAN = "hessian"
"""Where in the results the demo's own Hessian is, if no other was given."""


def score(config: ScoreConfig) -> str | None:
    """Score the training data and write the results under the run path.

    Every process of a run on several hosts calls this; the first one writes.

    Args:
        config: Validated.

    Returns:
        What the terminal shows; None on hosts that have nothing to say.

    Raises:
        UserError: If the input is wrong in any of the ways that `jhessians.errors` knows.
    """
    start_hosts()
    first = is_first_host()
    mesh = make_mesh(config.world_size)
    names = {each.name for each in options_of(type(config))}
    progress = Progress(
        quiet=config.quiet or not first, reword=partial(name_flags, names=names)
    )  # fmt: skip
    with ExitStack() as stack:
        with together():
            directory = RunDirectory(config.run_path, config.overwrite, writer=first)
            part = stack.enter_context(directory)
        run = config.run
        require_supported(run.matmul_precision, jax.local_devices()[0])
        hessian = _fitted_demo(config, part) if config.hessian is None else config.hessian
        work = prepare(config, run, hessian, mesh, progress)
        results = None
        if first:
            with progress.stage("Output"):
                results = _results(config, work, part)
        with together():
            pass
        _score_all(config, work, results, progress)
        if results is not None:
            _write_config(part, config, mesh)
        text = _render(config, work, results, progress) if results is not None else None
        with together():
            stack.close()
    return text


def _fitted_demo(config: ScoreConfig, part: Path) -> str:
    """Fit the demo's Hessian into the results, and return where it is."""
    fit = ComputeConfig(
        run_path=str(Path(config.run_path) / HESSIAN), method="ekfac", layout="bergson",
        world_size=config.world_size, quiet=config.quiet, debug=config.debug,
    )  # fmt: skip
    compute(fit, into=part / HESSIAN)
    return str(part / HESSIAN)


def _results(config: ScoreConfig, work: Work, part: Path) -> Results:
    results = Results(
        part, work.inputs.batches.documents, work.columns,
        tokens=config.attribute_tokens, parts=_parts(config, work)[0], top=config.top,
        candidates=work.candidates,
    )  # fmt: skip
    write_columns(part, work.columns, [work.query_text(column) for column in work.columns])
    return results


def _parts(config: ScoreConfig, work: Work) -> tuple[list[str] | None, np.ndarray | None]:
    """Names of the parts that scores are split into, and which part each module is of."""
    if config.by_module is None:
        return None, None
    names = module_names(work.metric.problem)
    if config.by_module == "layer":
        names = [
            name[: found.end()] if (found := re.search(r"\.\d+(?=\.|$)", name)) else name
            for name in names
        ]
    parts = list(dict.fromkeys(names))
    return parts, np.array([parts.index(name) for name in names])


def _score_all(
    config: ScoreConfig, work: Work, results: Results | None, progress: Progress
) -> None:
    """Every group of queries in turn: make it, then go through the data."""
    metric, columns = work.metric, work.columns
    by_self = config.normalize != NONE or config.unit_normalize or config.self
    size = _group_size(config, work)
    groups = [columns[start : start + size] for start in range(0, len(columns), size)]
    aggregate = config.query_aggregation != NONE
    making = None
    if not config.self:
        making = QueryPass(
            metric, count=size, rank=config.query_rank, unit_normalize=config.unit_normalize,
            aggregate=aggregate,
        )  # fmt: skip
    passing = ScorePass(
        metric, queries=0 if making is None else size, low_rank=config.query_rank is not None,
        by_module=config.by_module is not None, tokens=config.attribute_tokens,
        self_influence=by_self,
    )  # fmt: skip
    _, part_of = _parts(config, work)
    positions = work.batches.documents.positions
    scored: set[int] = set()
    kept: list[float] = []
    for number, columns_here in enumerate(groups):
        suffix = f" {number + 1} of {len(groups)}" if len(groups) > 1 else ""
        group = None  # the memory of the one before
        if making is not None:
            with progress.stage(f"Queries{suffix}"):
                group = _query_group(config, work, making, columns_here, size)
                kept += group.kept[: len(columns_here)].tolist()
            if number + 1 == len(groups) and not by_self:
                metric.forget_inverse()
        with progress.stage(f"Scores{suffix}", positions, "positions") as stage:
            for found in passing.run(work.batches, group, advance=stage.advance):
                if results is None:
                    continue
                scored |= set(found.documents[found.documents >= 0].tolist())
                _take(config, results, found, part_of, number * size)
    if config.query_rank is not None and kept:
        progress.note(
            f"Rank {config.query_rank} keeps {min(kept):.1%} to {max(kept):.1%} of the queries' "
            f"squared lengths, {np.mean(kept):.1%} on average"
        )
    if results is not None:
        with progress.stage("Lists"):
            results.finish(np.array(sorted(scored), int), work.text_of)


def _take(
    config: ScoreConfig,
    results: Results,
    found: BatchScores,
    part_of: np.ndarray | None,
    first_query: int,
) -> None:
    """Divide one batch's scores as was asked for, and pass them on."""
    scores, own = found.scores, found.self_influence
    if own is not None:
        own = own if own.ndim == 1 else own.sum(1)
        if first_query == 0:
            results.add_self_influence(found.documents, own)
    if scores is None:
        assert own is not None
        results.add(found.documents, own[:, None], 0)
        return
    how: Any = "root_self" if config.unit_normalize else config.normalize
    scores = normalized(scores, own, how)
    if part_of is not None:
        members = np.eye(part_of.max() + 1, dtype=scores.dtype)[part_of]
        scores = np.einsum("nmk,mp->npk", scores, members)
    results.add(found.documents, scores, first_query)


def _group_size(config: ScoreConfig, work: Work) -> int:
    """Queries that are in memory together."""
    if config.self or config.query_aggregation != NONE:
        return 1
    devices = work.metric.problem.mesh.size if work.metric.problem.mesh else 1
    each = query_bytes(work.metric, rank=config.query_rank) / devices
    fit = max(1, int(SHARE * free_memory() / each))
    return min(config.query_batch_size or fit, len(work.columns))


def _query_group(
    config: ScoreConfig, work: Work, making: QueryPass, columns: tuple[Column, ...], size: int
) -> QueryGroup:
    assert work.queries is not None
    weight, devices = 1.0, work.metric.problem.mesh.size if work.metric.problem.mesh else 1
    if config.query_aggregation != NONE:
        columns = tuple(columns_of(work.queries, tokens=False))
        weight = 1 / len(columns) if config.query_aggregation == "mean" else 1.0
    lengths = work.queries.lengths[[column.document for column in columns]]
    rows = -(-len(columns) // QUERIES_AT_ONCE // devices) or 1
    tokens = min(work.token_batch_size, int(lengths.max()) * rows)
    batches = ColumnBatches(
        work.queries, columns, tokens, devices, work.inputs.shape.positions
    )  # fmt: skip
    return making.run(batches, weight=weight)


def _write_config(part: Path, config: ScoreConfig, mesh: Mesh) -> None:
    """The configuration that replays the run, and what bergson reads of it: the scores' sign."""
    step = {"score": {"score_cfg": {"higher_is_better": True},
                      "index_cfg": {"run_path": config.run_path}}}  # fmt: skip
    document = config_document(
        "score", config.resolved_dict(), step, devices=[str(d) for d in mesh.devices.flat]
    )
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (part / CONFIG_FILE).write_text(text, encoding="utf-8")


def _render(config: ScoreConfig, work: Work, results: Results, progress: Progress) -> str:
    """What the terminal shows at the end."""
    documents = count_in_words(len(work.batches.documents), "document")
    columns = count_in_words(len(work.columns), "column" if config.query_tokens else "query")
    columns = columns.replace("querys", "queries")
    total = seconds_in_words(sum(progress.timings.values()))
    lines = [f"Scores of {documents} for {columns} are in {config.run_path} ({total})"]
    lines += [f"  {name:<24}{seconds_in_words(seconds):>12}"
              for name, seconds in progress.timings.items()]  # fmt: skip
    for warning in progress.warnings:
        lines.append(f"  warning: {warning}")
    for query, column in enumerate(work.columns[:QUERIES_SHOWN]):
        best = results.ranking.best(query)[:HELPFUL]
        worst = [] if config.self else results.ranking.worst(query)[:HARMFUL]
        lines += ["", *ranking_lines(work.query_text(column), best, worst, work.text_of)]
    if work.supporting is not None and config.top is None and config.candidates is None:
        scores = ScoreStore(results.folder).read_all()
        found = retrieval(scores, work.supporting)
        words = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        lines += ["", f"  Against the demo's known sources: {words}"]
    return "\n".join(lines)
