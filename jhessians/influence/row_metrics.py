"""Metrics of gradient rows: projected, normalised, in the inverse of dense Hessians."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jhessians.capture.documents import DocumentFold, JointDocumentFold
from jhessians.capture.problem import Problem
from jhessians.capture.site import Operands
from jhessians.capture.sites import unshared
from jhessians.errors import CheckpointError, ConfigError
from jhessians.fitting.autocorrelation import row_operands
from jhessians.fitting.eigenbases import place_rows
from jhessians.folds.normalizers import Normalizer
from jhessians.folds.row_scores import JointRows, RowQueries, RowScores, RowSelfInfluence
from jhessians.folds.rows import GradientRows
from jhessians.influence.curvature import FactorSource
from jhessians.influence.inversion import Inverse, dense_inverse
from jhessians.influence.metric import JOINT, Metric, Target, WholeGradients, members_of
from jhessians.typing import Array, DTypeLike, Float, PyTree


class DenseHessian(NamedTuple):
    """An autocorrelation Hessian, and how the rows were made that it is of.

    Attributes:
        hessians: Module's (or head's) name, or "joint" → [d, d].
        rows: How a gradient becomes a row.
        normalizers: Module's name → what its gradients are divided by.
        joint: Whether there is one Hessian for all modules.
    """

    hessians: Mapping[str, Any]
    rows: GradientRows
    normalizers: Mapping[str, Normalizer]
    joint: bool


class ModuleRows(Metric):
    """Rows of each module, in the inverse of a dense Hessian for each.

    Args:
        problem: Loss, model, linears and devices.
        hessian: The Hessian; its rows' number format is the scores'.
        inverse: How it is inverted.

    Raises:
        CheckpointError: If a module has no Hessian, or one of another shape.
    """

    def __init__(self, problem: Problem, hessian: DenseHessian, inverse: Inverse):
        super().__init__(
            replace(problem, sites=unshared(problem.sites)), hessian.rows.dtype
        )  # fmt: skip
        self._rows = replace(hessian.rows, tokens=False)
        self.curvature = True
        self.rows = row_operands(
            self.problem, hessian.rows, normalizers=hessian.normalizers or None
        )
        self.inverse = {}
        for name, site in self.problem.sites.items():
            size = self._rows.unit_size(site)
            stacked = np.stack([
                np.concatenate([
                    _inverted(hessian.hessians, unit, size, inverse)
                    for unit in self._rows.unit_names(site, module)
                ])
                for module in site.module_names()
            ]).astype(jnp.dtype(self.dtype))  # fmt: skip
            array = stacked[0] if site.members is None else stacked
            axis = 0 if site.members is None else 1
            self.inverse[name] = {"inverse": place_rows(array, problem.mesh, axis=axis)}

    def targets(self) -> dict[str, Target]:
        """See `Metric.targets`."""
        return {
            name: Target(
                members_of(site), self._rows.head_count(site) * self._rows.unit_size(site), 1
            )
            for name, site in self.problem.sites.items()
        }

    def query_fold(self, rank: int | None) -> DocumentFold:
        """See `Metric.query_fold`."""
        return RowQueries(self._rows, self.curvature)

    def score_fold(self, queries: int, *, low_rank: bool, tokens: bool) -> JointDocumentFold:
        """See `Metric.score_fold`."""
        return RowScores(replace(self._rows, tokens=tokens), queries)

    def self_fold(self) -> JointDocumentFold:
        """See `Metric.self_fold`."""
        return RowSelfInfluence(self._rows, self.curvature)


class GlobalRows(Metric):
    """Sums of all modules' rows, in the inverse of one dense Hessian; arguments as `ModuleRows`."""

    by_module = False

    def __init__(self, problem: Problem, hessian: DenseHessian, inverse: Inverse):
        super().__init__(
            replace(problem, sites=unshared(problem.sites)), hessian.rows.dtype
        )  # fmt: skip
        self._rows = replace(hessian.rows, tokens=False)
        self.curvature = True
        self.rows = row_operands(
            self.problem, hessian.rows, joint=True, normalizers=hessian.normalizers or None
        )
        assert hessian.rows.projection is not None
        self._size = hessian.rows.projection.dimension
        whole = _inverted(hessian.hessians, JOINT, self._size, inverse)
        self.inverse = {}
        self.finishing = jnp.asarray(whole.astype(jnp.dtype(self.dtype)))

    def targets(self) -> dict[str, Target]:
        """See `Metric.targets`."""
        return {JOINT: Target(None, self._size, 1)}

    def query_fold(self, rank: int | None) -> JointDocumentFold:
        """See `Metric.query_fold`."""
        return JointRows(self._rows)

    def score_fold(self, queries: int, *, low_rank: bool, tokens: bool) -> JointDocumentFold:
        """See `Metric.score_fold`."""
        return JointRows(replace(self._rows, tokens=tokens))

    def self_fold(self) -> JointDocumentFold:
        """See `Metric.self_fold`."""
        return JointRows(self._rows)

    def finish_queries(self, rows: PyTree[Array], finishing: PyTree[Array]) -> PyTree[Array]:
        """See `Metric.finish_queries`."""
        found = rows["documents"]
        applied = found @ finishing
        square = jnp.square(applied).sum(1)
        return {JOINT: {"matrix": applied[:, :, None], "self": (found * applied).sum(1),
                        "square": square, "kept": square}}  # fmt: skip

    def operands_of(self, queries: Operands) -> Operands:
        """See `Metric.operands_of`."""
        return {}

    def finish_scores(
        self, rows: PyTree[Array], queries: PyTree[Array], finishing: PyTree[Array]
    ) -> PyTree[Array]:
        """See `Metric.finish_scores`."""
        found = {}
        if "scores" in rows:
            p = queries[JOINT]["queries"].values[:, : self._size, 0]
            found["scores"] = rows["scores"] @ p.T
        if "self" in rows:
            found["self"] = (rows["self"] * (rows["self"] @ finishing)).sum(-1)
        return found


def _inverted(
    hessians: Mapping[str, Any], name: str, size: int, inverse: Inverse
) -> Float[np.ndarray, "d d"]:
    """A dense Hessian's damped inverse, in float64."""
    if name not in hessians:
        some = ", ".join(sorted(hessians)[:3]) or "none"
        raise CheckpointError(
            f"the Hessian has nothing of {name}; it has {some}: expected the Hessian of the same "
            "model, modules and heads"
        )
    matrix = np.asarray(getattr(hessians[name], "read", lambda: hessians[name])())
    if matrix.shape != (size, size):
        raise CheckpointError(
            f"the Hessian of {name} has shape {list(matrix.shape)}; this model's rows have {size} "
            "numbers: expected the Hessian of the same model and projection"
        )
    return dense_inverse(name, matrix, inverse)


def metric_of(
    problem: Problem,
    hessian: FactorSource | DenseHessian | None,
    inverse: Inverse,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Metric:
    """The metric of a Hessian.

    Args:
        problem: Loss, model, linears and devices.
        hessian: Kronecker factors, a dense Hessian, or None.
        inverse: How it is inverted.
        dtype: Number format of whole gradients; rows have their own.

    Returns:
        The form that fits.

    Raises:
        ConfigError: If the corrected eigenvalues are asked of a dense Hessian.
        CheckpointError, NumericsError: If the Hessian isn't of these linears, or is singular.
    """
    if not isinstance(hessian, DenseHessian):
        return WholeGradients(problem, hessian, inverse, dtype=dtype)
    if inverse.ev_correction:
        raise ConfigError(
            "`ev_correction` is for Kronecker factors, and this Hessian is an autocorrelation; "
            "leave it out"
        )
    return (GlobalRows if hessian.joint else ModuleRows)(problem, hessian, inverse)
