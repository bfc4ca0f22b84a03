"""Scores of training documents for queries: from Python, everything in memory.

The command line (`jhessians.commands.score`) goes the same way and writes as it goes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jhessians.capture.problem import Problem, document_ids
from jhessians.devices.hosts import fetch, most_of_hosts
from jhessians.errors import ConfigError
from jhessians.fitting.documents import DocumentPass, count_documents, in_order, map_documents
from jhessians.folds.combined import ByLinear, Several
from jhessians.folds.documents import DocumentGradients
from jhessians.influence.curvature import FactorSource
from jhessians.influence.inversion import DAMPING_FACTOR, Inverse
from jhessians.influence.metric import Metric
from jhessians.influence.queries import QueryGroup, QueryPass, merged
from jhessians.influence.row_metrics import DenseHessian, metric_of
from jhessians.linalg.inverse import Inversion
from jhessians.typing import Array, DTypeLike, Float, PyTree

Normalize = Literal["none", "self", "root_self"]
"""What a document's scores are divided by: nothing, its self-influence, or the root of that."""


class BatchScores(NamedTuple):
    """Scores of one batch's documents, on the host.

    Attributes:
        documents: Their numbers in the data, [row]; -1 for rows that only fill up the batch.
        scores: [row, query]; [row, position, query] of tokens, [row, module, query] by module.
            None where only self-influences are wanted.
        self_influence: gᵀ H⁻¹ g, [row], or [row, module]; None unless it is wanted.
    """

    documents: np.ndarray
    scores: np.ndarray | None
    self_influence: np.ndarray | None


class ScorePass:
    """The pass over the training data for one group of queries; compiled once for each shape.

    Args:
        metric: The inner product.
        queries: How many a group has; 0 for self-influences alone.
        low_rank: Whether queries are products of low rank.
        tokens: Whether each position has scores of its own.
        by_module: Whether each module's share is kept apart.
        self_influence: Whether documents' self-influences are wanted, too.

    Raises:
        ConfigError: If modules' shares are asked of a metric that has none, or of tokens.
    """

    def __init__(
        self,
        metric: Metric,
        *,
        queries: int,
        low_rank: bool = False,
        tokens: bool = False,
        by_module: bool = False,
        self_influence: bool = False,
    ):
        if by_module and not metric.by_module:
            raise ConfigError(
                "`by_module` splits sums over modules, but the global projection adds their "
                "gradients up before; leave it out"
            )
        if by_module and tokens:
            raise ConfigError("`by_module` and `attribute_tokens` exclude each other; give one")
        self.metric, self.by_module, self.own = metric, by_module, self_influence
        folds: list[tuple[str, Any]] = []
        if queries:
            fold = metric.score_fold(queries, low_rank=low_rank, tokens=tokens)
            folds.append(("scores", fold))
        if self_influence:
            folds.append(("self", metric.self_fold()))
        both = Several(tuple(folds))
        self._pass = DocumentPass(
            ByLinear(both) if by_module else both, metric.problem, finish=self._finish
        )

    def run(
        self,
        batches: Iterable[PyTree[np.ndarray]],
        group: QueryGroup | None,
        *,
        advance: Callable[[int], None] = lambda positions: None,
    ) -> Iterator[BatchScores]:
        """The scores of each batch in turn.

        Args:
            batches: This host's rows of the training data.
            group: The queries; None for self-influences alone.
            advance: Called when a batch is done, with how many of its positions counted.

        Yields:
            Documents and scores.
        """
        metric, queries = self.metric, {} if group is None else group.operands
        operands = merged(
            metric.operands_of(queries), metric.rows, metric.inverse if self.own else {}
        )
        finishing = (queries if metric.finishing is not None else {}, metric.finishing)
        for documents, rows in self._pass.run(
            batches, operands=operands, finishing=finishing, advance=advance
        ):
            host = {name: fetch(array) for name, array in rows.items()}
            yield BatchScores(documents, host.get("scores"), host.get("self"))

    def _finish(self, rows: PyTree[Array], finishing: PyTree[Array]) -> PyTree[Array]:
        if self.by_module:
            return self._modules(rows)
        return self.metric.finish_scores(rows["documents"], *finishing)

    def _modules(self, rows: PyTree[Array]) -> dict[str, Array]:
        """Every module's rows, in the order of `module_names`, behind the documents' axis."""
        apart: dict[str, list[Array]] = {}
        for key, site in self.metric.problem.sites.items():
            for name, array in rows[key].items():
                stacked = array[None] if site.members is None else array
                apart.setdefault(name, []).append(stacked)
        return {name: jnp.moveaxis(jnp.concatenate(x), 0, 1) for name, x in apart.items()}


def module_names(problem: Problem) -> list[str]:
    """All modules, in the order of scores by module."""
    return [name for site in problem.sites.values() for name in site.module_names()]


def normalized(
    scores: Float[np.ndarray, "..."], own: Float[np.ndarray, "..."] | None, how: Normalize
) -> Float[np.ndarray, "..."]:
    """Scores [row, …] divided by what `how` makes of self-influences [row]; 0 where these are 0."""
    if how == "none":
        return scores
    assert own is not None
    divisor = own if how == "self" else np.sqrt(np.maximum(own, 0))
    divisor = divisor.reshape(len(divisor), *[1] * (scores.ndim - 1))
    return np.divide(scores, divisor, out=np.zeros_like(scores), where=divisor != 0)


def score(
    problem: Problem,
    batches: Iterable[PyTree[np.ndarray]],
    queries: Iterable[PyTree[np.ndarray]],
    factors: Any = None,
    *,
    inversion: Inversion = "damped_inverse",
    damping_factor: float = DAMPING_FACTOR,
    ev_correction: bool | None = None,
    query_aggregation: Literal["none", "mean", "sum"] = "none",
    query_rank: int | None = None,
    unit_normalize: bool = False,
    normalize: Normalize = "none",
    documents: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[np.ndarray, "document query"]:
    """How much each training document helps with each query: g_nᵀ (H + damping)⁻¹ q_k.

    The larger, the more a step on the document lowers the query's loss.

    Args:
        problem: Loss (of the data's own labels, as a rule), model, linears and devices.
        batches: This host's rows of the training data.
        queries: This host's rows of the queries, all of which are on the devices at once.
        factors: The Hessian, from `load_factors` or `fit`; None for plain inner products.
        inversion: How it is inverted; one of `jhessians.linalg.inverse.INVERSIONS`.
        damping_factor: Relative to the mean eigenvalue of each linear.
        ev_correction: Whether eigenvalues are the corrected ones; None if there are such.
        query_aggregation: Whether queries are added up to one, or their mean taken.
        query_rank: How many outer products are kept of each query and linear; None for all.
        unit_normalize: Whether scores are cosines: divided by the roots of both self-influences.
        normalize: What each document's scores are divided by otherwise.
        documents: How many the data has; by default as many as the largest number says.
        dtype: Number format.

    Returns:
        Scores [document, query], in the order of the data and of the queries; a document that is in
        no batch has zeros.

    Raises:
        CheckpointError: If the factors are not those of the problem's linears.
        NumericsError: If a loss or a query's gradient isn't finite, or the Hessian is singular.
        ValueError: If a document or a query is in two rows, or the problem has several draws.
    """
    inverse = Inverse(inversion, damping_factor, ev_correction)
    metric = metric_of(problem, as_hessian(factors), inverse, dtype=dtype)
    queries = list(queries)
    count, numbered = _numbered(queries, problem)
    aggregate = query_aggregation != "none"
    group = QueryPass(
        metric, count=1 if aggregate else count, rank=query_rank, unit_normalize=unit_normalize,
        aggregate=aggregate,
    ).run(numbered, weight=1 / count if query_aggregation == "mean" else 1.0)  # fmt: skip
    if unit_normalize:
        normalize = "root_self"
    passing = ScorePass(
        metric, queries=1 if aggregate else count, low_rank=query_rank is not None,
        self_influence=normalize != "none",
    )  # fmt: skip
    ids, parts = [], []
    for numbers, scores, own in passing.run(batches, group):
        assert scores is not None
        ids.append(numbers)
        parts.append(normalized(scores, own, normalize))
    if not parts:
        raise ValueError("there are no batches; expected at least one")
    return in_order(parts, ids, count_documents(ids, documents))


def self_influence(
    problem: Problem,
    batches: Iterable[PyTree[np.ndarray]],
    factors: Any = None,
    *,
    inversion: Inversion = "damped_inverse",
    damping_factor: float = DAMPING_FACTOR,
    ev_correction: bool | None = None,
    documents: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[np.ndarray, " document"]:
    """Each document's influence on itself, g_nᵀ (H + damping)⁻¹ g_n; arguments as in `score`.

    Returns:
        [document], in the data's order; without factors the squares of the gradients' lengths.

    Raises:
        CheckpointError, NumericsError, ValueError: As in `score`.
    """
    inverse = Inverse(inversion, damping_factor, ev_correction)
    metric = metric_of(problem, as_hessian(factors), inverse, dtype=dtype)
    passing = ScorePass(metric, queries=0, self_influence=True)
    found = [(ids, own) for ids, _, own in passing.run(batches, None)]
    if not found:
        raise ValueError("there are no batches; expected at least one")
    ids = [numbers for numbers, _ in found]
    return in_order([own for _, own in found if own is not None], ids,
                    count_documents(ids, documents))  # fmt: skip


def document_gradients(
    problem: Problem, batches: Iterable[PyTree[np.ndarray]], **options: Any
) -> dict[str, Float[np.ndarray, "document out in"]]:
    """Every document's gradient, by module: `map_documents` of `DocumentGradients`."""
    return map_documents(DocumentGradients(), problem, batches, **options)


def as_hessian(factors: Any) -> FactorSource | DenseHessian | None:
    """Factors of `fit`, kind → module → array, as what is read one by one; others as they are."""
    if factors is None or isinstance(factors, DenseHessian) or hasattr(factors, "read"):
        return factors  # type: ignore[no-any-return]
    return _InMemory(factors)


class _InMemory:
    """Factors of `fit` as a source."""

    def __init__(self, factors: Mapping[str, Mapping[str, Any]]):
        self._factors = factors
        self.kinds = tuple(factors)
        self.modules = tuple(factors["eigenvalue"])

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        return {name: tuple(x.shape) for name, x in self._factors[kind].items()}

    def read(self, kind: str, module: str) -> np.ndarray:
        return np.asarray(self._factors[kind][module])


def _numbered(queries: list[Any], problem: Problem) -> tuple[int, list[Any]]:
    """How many queries there are, and batches that number them from 0."""
    ids = [document_ids(batch) for batch in queries]
    if any(numbers is None for numbers in ids):
        return sum(len(jax.tree.leaves(batch)[0]) for batch in queries) * problem.hosts, queries
    here = [np.asarray(numbers) for numbers in ids if numbers is not None]
    return most_of_hosts(count_documents(here, None)), queries
