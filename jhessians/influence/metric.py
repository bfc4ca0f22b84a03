"""The inner product gᵀ H⁻¹ q in which documents and queries meet, in each of its forms.

A metric knows which folds make queries and scores, and which arrays these need:

    WholeGradients   H of Kronecker factors, or none: gradients themselves
    ModuleRows       a dense H for each module, or head: projected and normalised gradients
    GlobalRows       one dense H for all modules together
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jhessians.capture.documents import DocumentFold, JointDocumentFold
from jhessians.capture.problem import Problem
from jhessians.capture.site import Operands
from jhessians.devices.memory import return_freed_memory
from jhessians.fitting.arithmetic import Work, correction, second_moments
from jhessians.folds.low_rank_scores import LowRankScores, cheapest_order
from jhessians.folds.queries import Queries
from jhessians.folds.scores import Scores, SelfInfluence
from jhessians.influence import arithmetic
from jhessians.influence.curvature import FactorSource, kronecker_operands
from jhessians.influence.inversion import Inverse
from jhessians.typing import Array, DTypeLike, PyTree

JOINT = "joint"
"""The key of what all linears have together."""


class Target(NamedTuple):
    """The form of a query's part at one key.

    Attributes:
        members: Linears of a stack; None outside a stack.
        rows: Of the matrix, by which it is sharded.
        columns: Of the matrix.
    """

    members: int | None
    rows: int
    columns: int


class Metric(ABC):
    """One form of the inner product.

    Attributes:
        problem: Loss, model, linears and devices.
        dtype: Number format.
        inverse: What the folds need of H⁻¹, by site; empty without a Hessian.
        rows: What they need besides, to make rows.
        curvature: Whether there is a Hessian.
        finishing: What `finish_queries` and `finish_scores` need.
        by_module: Whether scores are sums over modules.
        low_rank: Whether queries may be products of low rank.
    """

    inverse: Operands
    rows: Operands
    curvature: bool
    finishing: PyTree[Array] = None
    by_module = True
    low_rank = False

    def __init__(self, problem: Problem, dtype: DTypeLike):
        self.problem, self.dtype = problem, dtype

    def forget_inverse(self) -> None:
        """Free what only queries and self-influences need."""
        self.inverse = {}
        return_freed_memory()

    @abstractmethod
    def targets(self) -> dict[str, Target]:
        """Key → form of the parts that a query has."""

    @abstractmethod
    def query_fold(self, rank: int | None) -> DocumentFold | JointDocumentFold:
        """Makes queries of documents; `finish_queries` brings its rows into the form of targets."""

    @abstractmethod
    def score_fold(self, queries: int, *, low_rank: bool, tokens: bool) -> JointDocumentFold:
        """Makes documents' scores."""

    @abstractmethod
    def self_fold(self) -> JointDocumentFold:
        """Makes documents' self-influences."""

    def score_orders(
        self, *, positions: int, queries: int, rank: int | None, tokens: bool
    ) -> Mapping[str, int]:
        """Which product comes first, `gradients` or `vectors` → at how many modules.

        Arguments are those of `cheapest_order`.

        Returns:
            Nothing where there is but one order.
        """
        return {}

    def query_flop(self, work: Work) -> float | None:
        """What making a query of each document needs besides going through the model, if known."""
        return None

    def score_flop(
        self, work: Work, *, queries: int, rank: int | None, tokens: bool, own: bool
    ) -> float | None:
        """What scoring each document needs besides going through the model, if that is known.

        Args:
            work: The documents, and the linears.
            queries: How many; 0 for none.
            rank: Of the queries; None if they are whole.
            tokens: Whether each token has scores of its own.
            own: Whether each document's self-influence is wanted.

        Returns:
            FLOP.
        """
        return None

    def finish_queries(self, rows: PyTree[Array], finishing: PyTree[Array]) -> PyTree[Array]:
        """Key → `matrix` (or `left` and `right`), `self`, `square` and `kept`."""
        return rows

    def finish_scores(
        self, rows: PyTree[Array], queries: PyTree[Array], finishing: PyTree[Array]
    ) -> PyTree[Array]:
        """`scores` and `self`, as far as they were asked for, from the folds' rows."""
        return rows

    def operands_of(self, queries: Operands) -> Operands:
        """Those of a group of queries that `score_fold` needs; the rest is for `finish_scores`."""
        return queries


class WholeGradients(Metric):
    """Gradients themselves, in the inverse of Kronecker factors or in none.

    Args:
        problem: Loss, model, linears and devices.
        factors: The Hessian; None for plain inner products.
        inverse: How it is inverted.
        dtype: Number format.

    Raises:
        CheckpointError, NumericsError: As `kronecker_operands`.
    """

    low_rank = True

    def __init__(
        self,
        problem: Problem,
        factors: FactorSource | None,
        inverse: Inverse,
        *,
        dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(problem, dtype)
        self.curvature, self.rows = factors is not None, {}
        self.inverse = (
            {} if factors is None else kronecker_operands(problem, factors, inverse, dtype=dtype)
        )

    def targets(self) -> dict[str, Target]:
        """See `Metric.targets`."""
        return {
            name: Target(members_of(site), site.out_features, site.inputs)
            for name, site in self.problem.sites.items()
        }

    def query_fold(self, rank: int | None) -> DocumentFold:
        """See `Metric.query_fold`."""
        return Queries(self.curvature, rank, self.dtype)

    def score_fold(self, queries: int, *, low_rank: bool, tokens: bool) -> JointDocumentFold:
        """See `Metric.score_fold`."""
        return (LowRankScores if low_rank else Scores)(queries, tokens, self.dtype)

    def self_fold(self) -> JointDocumentFold:
        """See `Metric.self_fold`."""
        return SelfInfluence(self.curvature, self.dtype)

    def score_orders(
        self, *, positions: int, queries: int, rank: int | None, tokens: bool
    ) -> Mapping[str, int]:
        """See `Metric.score_orders`."""
        found: Counter[str] = Counter()
        for site in self.problem.sites.values():
            order = cheapest_order(
                site, positions=positions, queries=queries, rank=rank, tokens=tokens
            )
            found[order] += len(site.module_names())
        return found

    def query_flop(self, work: Work) -> float:
        """See `Metric.query_flop`."""
        return work.count(arithmetic.queries, curvature=self.curvature)

    def score_flop(
        self, work: Work, *, queries: int, rank: int | None, tokens: bool, own: bool
    ) -> float:
        """See `Metric.score_flop`."""
        flop = work.count(arithmetic.scores, queries=queries, rank=rank, tokens=tokens)
        if not own:
            return flop
        of_own = correction if self.curvature else second_moments
        return flop + work.count(of_own)


def members_of(site: Any) -> int | None:
    """How many linears of a stack are recorded; None outside a stack."""
    return None if site.members is None else len(site.members)
