"""What `score` works on: training data, queries, weights and the Hessian, read and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh

from jhessians import demo
from jhessians.capture.problem import Activations, Problem
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.problem import (
    Inputs,
    find_linears,
    gradient_loss,
    load_model,
    read_batches,
    read_inputs,
    require_same_data,
    settled_activations,
)
from jhessians.commands.score.config import NONE, OF_QUERIES, ScoreConfig
from jhessians.commands.score.hessian import open_hessian, options_of_run
from jhessians.commands.score.refining import ARRAYS, Refiner, refiner
from jhessians.data.batches import Batches
from jhessians.data.batching import plan_batches
from jhessians.data.documents import Documents
from jhessians.data.selecting import Column, columns_of, select
from jhessians.data.sources import DataOptions
from jhessians.devices.hosts import require_same, together
from jhessians.devices.memory import free_memory
from jhessians.errors import CheckpointError, DatasetError, UserError
from jhessians.influence.inversion import Inverse
from jhessians.influence.metric import Metric
from jhessians.influence.queries import query_bytes
from jhessians.influence.row_metrics import metric_of
from jhessians.interop.score_store import ScoreStore
from jhessians.report.progress import Progress

SHARE = 0.5
"""Of the memory that is free beside model and Hessian, what queries may take."""


@dataclass(frozen=True)
class Work:
    """What is scored, and through what.

    Attributes:
        inputs: The training data and the model's settings.
        batches: The documents that are scored.
        candidates: Their numbers in the data; None for all.
        queries: The queries' documents; None if there are none.
        columns: What each column of scores is about.
        metric: The inner product.
        token_batch_size: Tokens that a device takes at once.
        aggregation: How queries are made one, or `none`.
        group_size: Queries that are in memory together.
        supporting: Which documents are known to be relevant to each query, for the demo.
        refiner: Goes on from the factors' inverse; None if that is all.
    """

    inputs: Inputs
    batches: Batches
    candidates: np.ndarray | None
    queries: Documents | None
    columns: tuple[Column, ...]
    metric: Metric
    token_batch_size: int
    aggregation: str
    group_size: int
    supporting: list[list[int]] | None
    refiner: Refiner | None = None

    def text_of(self, document: int) -> str:
        """A training document's text."""
        return self.inputs.text_of(self.inputs.batches.documents, document)

    def query_text(self, column: Column) -> str:
        """A query's text, or that of one of its tokens."""
        if self.queries is None:
            return "self-influence"
        if self.aggregation != NONE:
            return f"{self.aggregation} of {len(self.queries)} queries"
        return self.inputs.text_of(self.queries, column.document, column.position)


def prepare(
    config: ScoreConfig,
    run: ComputeConfig,
    hessian: str,
    mesh: Mesh,
    progress: Progress,
    *,
    devices: int,
) -> Work:
    """Read everything, cheap and error-prone things first.

    Args:
        config: What is scored.
        run: The Hessian's run, as far as it is repeated.
        hessian: Its folder, or `none`.
        mesh: The devices.
        progress: Is told of stages.
        devices: Over how many of them the documents of a batch are divided.

    Returns:
        All that the passes need.
    """
    inputs = read_inputs(
        run, mesh, progress, token_batch_size=run.token_batch_size, devices=devices
    )
    queries, supporting = None, None
    if not config.self:
        with progress.stage("Queries' data"), together():
            queries = read_queries(config, run, inputs, mesh)
            supporting = _supporting(config, run) if config.query is None else None
        require_same("queries", queries.tokens, queries.labels, queries.offsets)
    columns: tuple[Column, ...] = (Column(0),)
    if queries is not None and config.query_aggregation == NONE:
        columns = tuple(columns_of(queries, tokens=config.query_tokens))
    batches, candidates = inputs.batches, None
    if config.candidates is not None:
        candidates = _candidates(config.candidates, config.top or 1, len(batches.documents))
        documents = select(batches.documents, candidates)
        plan = plan_batches(
            documents.lengths, token_batch_size=run.token_batch_size, devices=devices,
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
        dtype = np.dtype(np.float64 if run.precision == "fp64" else np.float32)
        # A refiner takes the queries' gradients as they are and inverts itself; then only
        # documents' self-influences need the factors' inverse.
        alone = config.refine == NONE or config.normalize != NONE
        metric = metric_of(problem, source if alone else None, inverse, dtype=dtype)
        refining = None
        if config.refine != NONE:
            plain = metric_of(problem, None, inverse, dtype=dtype) if alone else metric
            refining = refiner(
                config, plain, source, hessian, inputs.batches.documents,
                token_batch_size=run.token_batch_size, positions=inputs.shape.positions,
                devices=devices,
            )  # fmt: skip
    if config.hessian not in (None, NONE):
        fitted = options_of_run(str(config.hessian)).get("dataset")
        if config.dataset is not None and fitted != config.dataset:
            progress.warn(
                f"the Hessian was fitted on {fitted or 'the demo'}, not on {config.dataset}, whose "
                "documents are scored"
            )
    size = _group_size(config, metric, len(columns))
    taken = size * query_bytes(metric, rank=_rank_at_first(config))
    taken *= 1 if refining is None else 1 + ARRAYS
    choice = settled_activations(run.activations, problem, batches, mesh, taken, progress.note)
    metric.problem = replace(problem, activations=cast(Activations, choice))
    if refining is not None:
        refining.metric.problem = metric.problem
    return Work(
        inputs, batches, candidates, queries, columns, metric, run.token_batch_size,
        config.query_aggregation, size, supporting, refining,
    )  # fmt: skip


def read_queries(config: ScoreConfig, run: ComputeConfig, inputs: Inputs, mesh: Mesh) -> Documents:
    """The queries' data set; without one, the demo's questions.

    Args:
        config: Names it.
        run: The Hessian's run, as far as it is repeated.
        inputs: With the tokenizer and the model's shape.
        mesh: The devices.

    Returns:
        A document for each query.

    Raises:
        UserError: If they can't be read, don't fit the model, or one predicts nothing.
    """
    with _of_queries():
        queries = read_batches(
            _query_options(config), inputs.tokenizer, inputs.shape, mesh,
            token_batch_size=min(run.token_batch_size, inputs.shape.positions),
        ).documents  # fmt: skip
    _require_predicted(queries)
    return queries


def _rank_at_first(config: ScoreConfig) -> int | None:
    """Of queries as they are made: those to be refined are whole."""
    return config.query_rank if config.refine == NONE else None


def _group_size(config: ScoreConfig, metric: Metric, columns: int) -> int:
    """Queries that are in memory together."""
    if config.self or config.query_aggregation != NONE:
        return 1
    devices = metric.problem.mesh.size if metric.problem.mesh else 1
    each = query_bytes(metric, rank=_rank_at_first(config)) / devices
    if config.refine != NONE:
        each *= 1 + ARRAYS * devices  # these every device holds whole
    fit = max(1, int(SHARE * free_memory() / each))
    return min(config.query_batch_size or fit, columns)


def _problem(
    config: ScoreConfig, run: ComputeConfig, inputs: Inputs, mesh: Mesh, progress: Progress
) -> Problem:
    model = load_model(
        inputs, mesh, progress, precision=run.precision, revision=run.revision, fsdp=run.fsdp
    )
    loss = gradient_loss(run)
    sites = find_linears(loss, model, inputs, run, progress.note)
    return Problem(
        loss, model, sites, mesh=mesh if mesh.size > 1 else None,
        matmul_precision=run.matmul_precision,
    )  # fmt: skip


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


@contextmanager
def _of_queries() -> Iterator[None]:
    """Let an error say that it is one of the queries, and name their own options.

    Raises:
        UserError: The same, in other words.
    """
    try:
        yield
    except UserError as error:
        own = {"dataset": "query"} | {name: f"query_{name}" for name in OF_QUERIES}
        line = re.sub(r"`(\w+)`", lambda found: f"`{own.get(found[1], found[1])}`", str(error))
        raise type(error)(f"the queries: {line}") from error


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
