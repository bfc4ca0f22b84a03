"""The passes of `score`: a group of queries through the inverse, then all documents, and again."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import numpy as np

from jhessians.commands.resuming import positions_of
from jhessians.commands.score.config import NONE, ScoreConfig
from jhessians.commands.score.refining import Refiner
from jhessians.commands.score.results import Results
from jhessians.commands.score.work import Work
from jhessians.config.units import count_in_words
from jhessians.data.selecting import Column, ColumnBatches, columns_of
from jhessians.fitting.checkpoints import Series
from jhessians.influence.queries import QueryGroup, QueryPass
from jhessians.influence.ranking import Ranking
from jhessians.influence.scoring import BatchScores, ScorePass, module_names, normalized
from jhessians.report.progress import Progress
from jhessians.report.recorder import gone_through

QUERIES_AT_ONCE = 16
"""So many parts of a group, at most, are made in one batch: its rows are in memory besides."""


def parts(config: ScoreConfig, work: Work) -> tuple[list[str] | None, np.ndarray | None]:
    """Names of the parts that scores are split into, and which part each module is of."""
    if config.by_module is None:
        return None, None
    names = module_names(work.metric.problem)
    if config.by_module == "layer":
        names = [
            name[: found.end()] if (found := re.search(r"\.\d+(?=\.|$)", name)) else name
            for name in names
        ]
    different = list(dict.fromkeys(names))
    return different, np.array([different.index(name) for name in names])


def score_all(
    config: ScoreConfig,
    work: Work,
    results: Results | None,
    progress: Progress,
    kept: Series | None = None,
) -> dict[str, float]:
    """Every group of queries in turn: make it, then go through the data.

    Args:
        config: The options.
        work: Data, queries and Hessian.
        results: Where scores go; None on hosts that write nothing.
        progress: Is told of stages.
        kept: Where the position is saved, and from where it is continued.

    Returns:
        Stage → FLOP that it needed, for a profile; nothing where that isn't wanted or known.
    """
    metric, columns = work.metric, work.columns
    by_self = config.normalize != NONE or config.unit_normalize or config.self
    size = work.group_size
    groups = [columns[start : start + size] for start in range(0, len(columns), size)]
    aggregate = config.query_aggregation != NONE
    making = None
    if not config.self:
        # A refiner takes whole gradients, and gives queries of low rank itself.
        whole = work.refiner is not None
        making = QueryPass(
            metric if work.refiner is None else work.refiner.metric, count=size,
            rank=None if whole else config.query_rank, unit_normalize=config.unit_normalize,
            aggregate=aggregate,
        )  # fmt: skip
    passing = ScorePass(
        metric, queries=0 if making is None else size, low_rank=config.query_rank is not None,
        by_module=config.by_module is not None, tokens=config.attribute_tokens,
        self_influence=by_self,
    )  # fmt: skip
    _, part_of = parts(config, work)
    positions = work.batches.documents.positions
    place = _Place(kept or Series(), results, len(columns))
    flop: dict[str, float | None] = {}
    going_through = None
    if config.profile:
        going_through = gone_through(metric.problem, next(iter(work.batches)))
    for number, columns_here in enumerate(groups[place.group :], start=place.group):
        suffix = f" {number + 1} of {len(groups)}" if len(groups) > 1 else ""
        group = None  # the memory of the one before
        if making is not None:
            with progress.stage(f"Queries{suffix}"):
                group = _query_group(config, work, making, columns_here, size)
            if work.refiner is not None:
                group = _refined(
                    work.refiner, group, columns_here, number * size, f"Refinement{suffix}",
                    progress, results,
                )  # fmt: skip
            elif going_through is not None and work.queries is not None:
                asked = columns_here if not aggregate else columns_of(work.queries, tokens=False)
                lengths = work.queries.lengths[[column.document for column in asked]]
                done, passes = going_through(lengths)
                flop[f"Queries{suffix}"] = _sum(passes, metric.query_flop(done))
            place.take_shares(number * size, group.kept[: len(columns_here)])
            if number + 1 == len(groups) and not by_self:
                metric.forget_inverse()
        with progress.stage(f"Scores{suffix}", positions, "positions") as stage:
            batches = iter(work.batches)
            stage.advance(positions_of(metric.problem, islice(batches, place.batches)))
            for found in passing.run(batches, group, advance=stage.advance):
                if results is not None:
                    _take(config, results, found, part_of, number * size)
                place.move(last=len(work.batches.plan))
        if going_through is not None:
            done, passes = going_through(work.batches.documents.lengths)
            flop[f"Scores{suffix}"] = _sum(passes, metric.score_flop(
                done, queries=0 if making is None else len(columns_here), rank=config.query_rank,
                tokens=config.attribute_tokens, own=by_self))  # fmt: skip
    if making is not None and (order := _order_of_products(config, work, size)):
        progress.note(order)
    if config.query_rank is not None and place.shares:
        shares = place.shares
        progress.note(
            f"Rank {config.query_rank} keeps {min(shares):.1%} to {max(shares):.1%} of the "
            f"queries' squared lengths, {np.mean(shares):.1%} on average"
        )
    if results is not None:
        with progress.stage("Lists"):
            results.finish(np.flatnonzero(work.batches.documents.lengths > 1), work.text_of)
    return {stage: each for stage, each in flop.items() if each is not None}


class _Place:
    """How far the passes have come, saved now and then; arguments as in `score_all`.

    Attributes:
        group: The group of queries that is worked on.
        batches: How many batches of its pass are done.
        shares: What each query keeps of its squared length, of those that were made.
    """

    def __init__(self, kept: Series, results: Results | None, columns: int):
        self._kept, self._results = kept, results
        # Only the first host writes, so that the others' rankings are of no account.
        self._ranking = Ranking(columns, 1) if results is None else results.ranking
        self.group, self.batches, self.shares = 0, 0, list[float]()
        formats = tuple(array.dtype for array in self._ranking.state)
        if saved := kept.load(lambda position: formats):
            self.group, self.batches = saved.position["groups"], saved.position["batches"]
            self.shares = saved.position["shares"]
            if results is not None:
                self._ranking.take_up(saved.arrays)

    def take_shares(self, first: int, shares: np.ndarray) -> None:
        """What the queries from number `first` on keep of their squared lengths."""
        self.shares[first:] = shares.tolist()

    def move(self, *, last: int) -> None:
        """Count a batch, and save if it is time.

        Args:
            last: How many batches a pass has.
        """
        self.batches += 1
        if self.batches == last:
            self.group, self.batches = self.group + 1, 0
        if self._kept.due():
            if self._results is not None:
                self._results.flush()
            position = {"groups": self.group, "batches": self.batches, "shares": self.shares}
            self._kept.save(position, self._ranking.state)


def _refined(
    refiner: Refiner,
    group: QueryGroup,
    columns: tuple[Column, ...],
    first: int,
    name: str,
    progress: Progress,
    results: Results | None,
) -> QueryGroup:
    with progress.stage(name, refiner.steps, "steps") as stage:
        refined, found = refiner.refine(group, stage.advance)
    count = len(columns)
    before = found.residuals[0, :count]
    after = found.residuals[found.kept, np.arange(len(found.kept))][:count]
    note = (
        f"{name}: {found.steps[-1]} steps; residuals {before.min():.2g} to {before.max():.2g} "
        f"before, {after.min():.2g} to {after.max():.2g} after"
    )
    if same := int(((found.kept[:count] == 0) & (before > refiner.tolerance)).sum()):
        note += f"; {count_in_words(same, 'column')} of {count} found nothing better than the start"
    progress.note(note)
    if results is not None:
        results.add_refinement(found, first, count)
    return refined


def _sum(passes: float, products: float | None) -> float | None:
    return None if products is None else passes + products


def _order_of_products(config: ScoreConfig, work: Work, size: int) -> str | None:
    """Which order of products is the cheapest at which modules, in words."""
    longest = int(work.batches.documents.lengths.max())
    orders = work.metric.score_orders(
        positions=longest, queries=size, rank=config.query_rank, tokens=config.attribute_tokens
    )
    words = {
        "gradients": "each document's gradient is formed, then multiplied with all queries",
        "vectors": "tokens' vectors are multiplied with the queries, without forming gradients",
    }
    said = [f"at {count_in_words(count, 'module')} {words[order]}"
             for order, count in orders.items()]  # fmt: skip
    return f"Cheapest order of products: {'; '.join(said)}" if said else None


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
