"""What `score` does: queries through the inverse Hessian, a pass over the data, and its results."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from jhessians import demo
from jhessians.capture.problem import Activations, Problem
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute, is_first_host
from jhessians.commands.problem import (
    Inputs,
    find_linears,
    load_model,
    read_batches,
    read_inputs,
    require_same_data,
    settled_activations,
)
from jhessians.commands.score.config import NONE, ScoreConfig
from jhessians.commands.score.hessian import open_hessian
from jhessians.commands.score.listing import (
    HARMFUL,
    HELPFUL,
    QUERIES_SHOWN,
    ranking_lines,
    retrieval,
)
from jhessians.commands.score.results import Results, write_columns
from jhessians.config.option import name_flags, options_of
from jhessians.config.provenance import CONFIG_FILE, config_document
from jhessians.config.units import count_in_words, seconds_in_words
from jhessians.data.batches import Batches
from jhessians.data.batching import plan_batches
from jhessians.data.documents import Documents
from jhessians.data.selecting import Column, ColumnBatches, columns_of, select
from jhessians.data.sources import DataOptions
from jhessians.devices.hosts import require_same, start_hosts, together
from jhessians.devices.memory import free_memory
from jhessians.devices.mesh import make_mesh
from jhessians.devices.precision import require_supported
from jhessians.errors import CheckpointError, DatasetError
from jhessians.influence.curvature import Inverse
from jhessians.influence.metric import Metric, metric_of
from jhessians.influence.queries import QueryGroup, QueryPass, query_bytes
from jhessians.influence.scoring import BatchScores, ScorePass, module_names, normalized
from jhessians.interop.rundir import RunDirectory
from jhessians.interop.score_store import ScoreStore
from jhessians.models.loss import NextTokenLoss
from jhessians.report.progress import Progress

SHARE = 0.5
"""Of the memory that is free beside model and Hessian, what queries may take."""

QUERIES_AT_ONCE = 8
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
        work = _prepare(config, run, hessian, mesh, progress)
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


@dataclass(frozen=True)
class _Work:
    """What is scored, and through what.

    Attributes:
        inputs: The training data and the model's settings.
        batches: The documents that are scored.
        candidates: Their numbers in the data; None for all.
        queries: The queries' documents; None if there are none.
        columns: What each column of scores is about.
        metric: The inner product.
        token_batch_size: Tokens that a device takes at once.
        supporting: Which documents are known to be relevant to each query, for the demo.
    """

    inputs: Inputs
    batches: Batches
    candidates: np.ndarray | None
    queries: Documents | None
    columns: tuple[Column, ...]
    metric: Metric
    token_batch_size: int
    supporting: list[list[int]] | None

    def text_of(self, document: int) -> str:
        """A training document's text."""
        return self._decoded(self.inputs.batches.documents, document)

    def query_text(self, column: Column) -> str:
        """A query's text, or that of one of its tokens."""
        if self.queries is None:
            return "self-influence"
        return self._decoded(self.queries, column.document, column.position)

    def _decoded(self, documents: Documents, number: int, position: int | None = None) -> str:
        tokens, _ = documents.document(number)
        chosen = tokens if position is None else tokens[position : position + 1]
        decoder: Any = self.inputs.tokenizer
        text: str = decoder.decode(np.asarray(chosen).tolist(), skip_special_tokens=True)
        return text


def _fitted_demo(config: ScoreConfig, part: Path) -> str:
    """Fit the demo's Hessian into the results, and return where it is."""
    fit = ComputeConfig(
        run_path=str(Path(config.run_path) / HESSIAN), method="ekfac", layout="bergson",
        world_size=config.world_size, quiet=config.quiet, debug=config.debug,
    )  # fmt: skip
    compute(fit, into=part / HESSIAN)
    return str(part / HESSIAN)


def _prepare(
    config: ScoreConfig, run: ComputeConfig, hessian: str, mesh: Mesh, progress: Progress
) -> _Work:
    """Read everything, cheap and error-prone things first."""
    inputs = read_inputs(run, mesh, progress, token_batch_size=run.token_batch_size)
    queries, supporting = None, None
    if not config.self:
        with progress.stage("Queries' data"), together():
            is_demo = config.query is None
            options = _query_options(config)
            queries = read_batches(
                options, inputs.tokenizer, inputs.shape, mesh,
                token_batch_size=min(run.token_batch_size, inputs.shape.positions),
            ).documents  # fmt: skip
            supporting = _supporting(config, run) if is_demo else None
            _require_predicted(queries)
        require_same("queries", queries.tokens, queries.labels, queries.offsets)
    columns: tuple[Column, ...] = (Column(0),)
    if queries is not None and config.query_aggregation == NONE:
        columns = tuple(columns_of(queries, tokens=config.query_tokens))
    batches, candidates = inputs.batches, None
    if config.candidates is not None:
        candidates = _candidates(config.candidates, config.top or 1, len(batches.documents))
        documents = select(batches.documents, candidates)
        plan = plan_batches(
            documents.lengths, token_batch_size=run.token_batch_size, devices=mesh.size,
            max_length=inputs.shape.positions,
        )  # fmt: skip
        batches = Batches(documents, plan)
        require_same_data(batches)
    problem = _problem(config, run, inputs, mesh, progress)
    with progress.stage("Hessian"), together():
        source = open_hessian(hessian, run, problem) if config.has_hessian else None
        inverse = Inverse(
            cast(Any, config.inversion), config.damping_factor, config.ev_correction
        )  # fmt: skip
        metric = metric_of(problem, source, inverse, dtype=np.dtype(
            np.float64 if run.precision == "fp64" else np.float32))  # fmt: skip
    if config.dataset is not None and config.hessian not in (None, NONE):
        progress.warn(
            f"the Hessian may be of other data than {config.dataset}; its run says of which"
        )
    return _Work(inputs, batches, candidates, queries, columns, metric, run.token_batch_size,
                 supporting)  # fmt: skip


def _problem(
    config: ScoreConfig, run: ComputeConfig, inputs: Inputs, mesh: Mesh, progress: Progress
) -> Problem:
    model = load_model(
        inputs, mesh, progress, precision=run.precision, revision=run.revision, fsdp=run.fsdp
    )
    loss = NextTokenLoss(
        labels="dataset",
        # The gradient itself is wanted here, not a curvature that is quadratic in it.
        reduction="sum" if run.loss_reduction == "sum" else "mean_gradient",
        function="log_odds" if run.loss_fn == "log_odds" else "cross_entropy",
        label_smoothing=run.label_smoothing,
    )
    sites = find_linears(loss, model, inputs, run, progress.note)
    problem = Problem(
        loss, model, sites, mesh=mesh if mesh.size > 1 else None,
        matmul_precision=run.matmul_precision,
    )  # fmt: skip
    choice = settled_activations(
        run.activations, problem, inputs.batches, mesh, 0, progress.note
    )  # fmt: skip
    return replace(problem, activations=cast(Activations, choice))


def _query_options(config: ScoreConfig) -> DataOptions:
    if config.query is None:
        return DataOptions(
            str(demo.QUESTIONS), prompt_column="prompt", completion_column="completion"
        )
    return DataOptions(
        dataset=config.query,
        split=config.query_split,
        subset=config.query_subset,
        prompt_column=config.query_prompt_column,
        completion_column=config.query_completion_column,
        conversation_column=config.query_conversation_column,
        truncation=config.query_truncation,
    )


def _supporting(config: ScoreConfig, run: ComputeConfig) -> list[list[int]] | None:
    """The demo's known sources, where all of its documents are scored whole."""
    if config.query_tokens or config.query_aggregation != NONE or config.attribute_tokens:
        return None
    if run.split != "train" or run.max_tokens is not None or run.chunk_length:
        return None
    lines = demo.QUESTIONS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["supporting"] for line in lines]


def _require_predicted(queries: Documents) -> None:
    """Check that something is predicted in every query.

    Raises:
        DatasetError: With the number of the first in which nothing is.
    """
    for number in range(len(queries)):
        _, labels = queries.document(number)
        if not (labels[1:] >= 0).any():
            raise DatasetError(
                f"query {number} (of {len(queries)}) has no token to predict; expected two tokens "
                "or more, and a completion that isn't empty: correct it or leave it out"
            )


def _candidates(path: str, count: int, documents: int) -> np.ndarray:
    """The documents among the best `count` of any query of earlier scores."""
    store = ScoreStore(path)
    if store.offsets is not None:
        raise CheckpointError(f"{path} holds tokens' scores; `candidates` takes documents'")
    numbers = np.arange(store.documents) if store.candidates is None else store.candidates
    if len(numbers) and numbers.max() >= documents:
        raise CheckpointError(
            f"{path} has a score of document {numbers.max()}, but the data set has {documents}; "
            "give scores of the same data"
        )
    chosen: set[int] = set()
    for query in range(store.queries):
        scores, written = store.read(query)
        order = np.argsort(-np.where(written, scores, -np.inf), kind="stable")[:count]
        chosen |= set(numbers[order[written[order]]].tolist())
    if not chosen:
        raise CheckpointError(f"{path} holds no scores; give a finished run of jhessians score")
    return np.array(sorted(chosen))


def _results(config: ScoreConfig, work: _Work, part: Path) -> Results:
    results = Results(
        part, work.inputs.batches.documents, work.columns,
        tokens=config.attribute_tokens, parts=_parts(config, work)[0], top=config.top,
        candidates=work.candidates,
    )  # fmt: skip
    write_columns(part, work.columns, [work.query_text(column) for column in work.columns])
    return results


def _parts(config: ScoreConfig, work: _Work) -> tuple[list[str] | None, np.ndarray | None]:
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
    config: ScoreConfig, work: _Work, results: Results | None, progress: Progress
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
        group = None
        if making is not None:
            with progress.stage(f"Queries{suffix}"):
                group = _query_group(config, work, making, columns_here, size)
                kept += group.kept[: len(columns_here)].tolist()
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


def _group_size(config: ScoreConfig, work: _Work) -> int:
    """Queries that are in memory together."""
    if config.self or config.query_aggregation != NONE:
        return 1
    devices = work.metric.problem.mesh.size if work.metric.problem.mesh else 1
    each = query_bytes(work.metric, rank=config.query_rank) / devices
    fit = max(1, int(SHARE * free_memory() / each))
    return min(config.query_batch_size or fit, len(work.columns))


def _query_group(
    config: ScoreConfig, work: _Work, making: QueryPass, columns: tuple[Column, ...], size: int
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


def _render(config: ScoreConfig, work: _Work, results: Results, progress: Progress) -> str:
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
