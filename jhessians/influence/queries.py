"""Queries on the devices: gradients after the inverse Hessian, in groups that memory holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jhessians.capture.fold import Matrices
from jhessians.capture.site import Operands
from jhessians.capture.traversal import row_shardings
from jhessians.devices.hosts import fetch
from jhessians.errors import ConfigError, NumericsError
from jhessians.fitting.documents import DocumentPass
from jhessians.fitting.eigenbases import place_rows
from jhessians.influence.metric import Metric, Target
from jhessians.linalg.low_rank import truncate
from jhessians.typing import Array, Float, PyTree


@dataclass(frozen=True)
class QueryGroup:
    """Some queries, ready to be multiplied with documents' gradients.

    Attributes:
        operands: Those of `Scores`, or of `LowRankScores`, by site.
        self_influence: Each query's gᵀ H⁻¹ g, [query].
        kept: The share of each query's squared length that its low rank keeps, [query]; 1 without.
    """

    operands: Operands
    self_influence: Float[np.ndarray, " query"]
    kept: Float[np.ndarray, " query"]


class QueryPass:
    """Makes groups of queries from batches; compiled once for each shape.

    Args:
        metric: The inner product.
        count: Queries of a group.
        rank: How many outer products are kept of each query and linear; None for all.
        unit_normalize: Whether each query is divided by the root of its gᵀ H⁻¹ g.
        aggregate: Whether all are added up to one, with the weight that `run` is given.

    Raises:
        ConfigError: If queries of low rank are asked of a metric that has none.
    """

    def __init__(
        self,
        metric: Metric,
        *,
        count: int,
        rank: int | None = None,
        unit_normalize: bool = False,
        aggregate: bool = False,
    ):
        if rank is not None and not metric.low_rank:
            raise ConfigError(
                "`query_rank` is for whole gradients, and those of this Hessian are projected; "
                "leave it out"
            )
        self.metric, self.count, self.rank = metric, count, rank
        # What is added up first loses its rank afterwards.
        self._aggregate, self._unit = aggregate, unit_normalize
        self._kept_rank = None if aggregate else rank
        fold = metric.query_fold(self._kept_rank)
        self._pass = DocumentPass(fold, metric.problem, finish=self._finish)
        self._place = jax.jit(self._placed, donate_argnums=0, out_shardings=self._shardings())

    def run(self, batches: Iterable[Any], *, weight: float = 1.0) -> QueryGroup:
        """A group of queries.

        Args:
            batches: Whose `document` is the number of the query among these; -1 for none.
            weight: Of each query where they are added up.

        Returns:
            The queries; those that no batch has are zeros.

        Raises:
            NumericsError: If a query's gradient isn't finite.
        """
        operands = self._zeros()
        own, kept = np.zeros(self.count), np.ones(self.count)
        metric = self.metric
        found = self._pass.run(
            batches,
            operands=merged(metric.rows, metric.inverse),
            finishing=metric.finishing,
            ahead=False,  # rows are as large as queries
        )
        for documents, rows in found:
            sums = jax.tree.map(fetch, rows["sums"])
            real = documents >= 0
            _require_finite(documents[real], sums["square"][real])
            places = np.where(real, 0 if self._aggregate else documents, -1).astype(np.int32)
            operands = self._place(operands, rows["matrices"], places, np.float32(weight))
            del rows
            if not self._aggregate:
                own[documents[real]] = sums["self"][real]
                square = sums["square"][real]
                whole = np.divide(sums["kept"][real], square, out=np.ones_like(square),
                                  where=square != 0)  # fmt: skip
                kept[documents[real]] = whole
        if self._aggregate and self.rank is not None:
            operands, kept = truncated(metric, operands, self.rank)
        return QueryGroup(operands, own, kept)

    def _finish(self, rows: PyTree[Array], finishing: PyTree[Array]) -> PyTree[Array]:
        """Add up the linears' numbers, and give unit length where that is wanted."""
        rows, targets = self.metric.finish_queries(rows, finishing), self.metric.targets()
        sums = {
            name: jnp.stack([
                rows[key][name] if targets[key].members is None else rows[key][name].sum(0)
                for key in targets
            ]).sum(0)
            for name in ("self", "square", "kept")
        }  # fmt: skip
        names = [name for name in ("matrix", "left", "right") if name in next(iter(rows.values()))]
        matrices = {key: {name: rows[key][name] for name in names} for key in targets}
        if self._unit:
            length = jnp.sqrt(sums["self"])
            factor = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
            scaled = "right" if "right" in names else "matrix"
            for here in matrices.values():
                shape = [1] * (here[scaled].ndim - 3) + [len(factor), 1, 1]
                here[scaled] = here[scaled] * factor.reshape(shape)
        return {"sums": sums, "matrices": matrices}

    def _zeros(self) -> PyTree[Array]:
        zeros: PyTree[Array] = jax.jit(self._buffers, out_shardings=self._shardings())()
        return zeros

    def _buffers(self) -> dict[str, dict[str, Any]]:
        mesh = self.metric.problem.mesh
        devices = mesh.size if mesh else 1

        def buffers(target: Target) -> dict[str, Any]:
            stack = () if target.members is None else (target.members,)
            o, i = target.rows, target.columns
            if self._kept_rank is None:
                shape = (*stack, self.count, o + -o % devices, i)
                return {"queries": Matrices(jnp.zeros(shape, self.metric.dtype))}
            shape = (*stack, self.count + -self.count % devices, self._kept_rank)
            return {name: jnp.zeros((*shape, d), self.metric.dtype)
                    for name, d in (("left", o), ("right", i))}  # fmt: skip

        return {name: buffers(target) for name, target in self.metric.targets().items()}

    def _shardings(self) -> Any:
        problem = self.metric.problem
        if problem.mesh is None:
            return None
        return row_shardings(problem.sites, jax.eval_shape(self._buffers), problem.mesh)

    def _placed(
        self, operands: PyTree[Array], rows: PyTree[Array], places: Array, weight: Array
    ) -> PyTree[Array]:
        """Add each row in its query's place; those of place -1 nowhere."""

        def placed(target: Target, buffer: Array, new: Array) -> Array:
            axis = 0 if target.members is None else 1
            missing = buffer.shape[-2] - new.shape[-2]
            new = jnp.pad(new, [(0, 0)] * (new.ndim - 2) + [(0, missing), (0, 0)])
            new = new.astype(buffer.dtype)

            def step(row: Array, buffer: Array) -> Array:
                place = jnp.maximum(places[row], 0)
                factor = jnp.where(places[row] < 0, 0, weight).astype(buffer.dtype)
                before = lax.dynamic_slice_in_dim(buffer, place, 1, axis)
                one = factor * lax.dynamic_slice_in_dim(new, row, 1, axis)
                return lax.dynamic_update_slice_in_dim(buffer, before + one, place, axis)

            return lax.fori_loop(0, len(places), step, buffer)

        result: dict[str, dict[str, Any]] = {}
        for name, target in self.metric.targets().items():
            here, new = operands[name], rows[name]
            if "matrix" in new:
                values = placed(target, here["queries"].values, new["matrix"])
                result[name] = {"queries": Matrices(values)}
            else:
                result[name] = {side: placed(target, here[side], new[side]) for side in here}
        return result


def truncated(
    metric: Metric, operands: Operands, rank: int
) -> tuple[Operands, Float[np.ndarray, " query"]]:
    """Whole queries as products of low rank.

    Args:
        metric: That they were made for.
        operands: Theirs.
        rank: Outer products of each query and linear.

    Returns:
        Their operands, and the share of its squared length that each keeps; 1 where that is 0.
    """
    total: Any = 0.0
    kept: Any = 0.0
    result: dict[str, dict[str, Any]] = {}
    mesh = metric.problem.mesh
    devices = mesh.size if mesh else 1
    shorten = jax.jit(lambda m: lax.map(lambda x: truncate(x, rank), m))
    for name, here in operands.items():
        matrices = here["queries"].values
        _, o, i = metric.targets()[name]
        before = matrices.shape[:-2]
        many = fetch(matrices)[..., :o, :].reshape(-1, o, i)
        left, right = (np.asarray(x) for x in shorten(many))
        # The members of a stack come first.
        total += np.square(many).sum((1, 2)).reshape(-1, before[-1]).sum(0)
        kept += np.square(right).sum((1, 2)).reshape(-1, before[-1]).sum(0)
        for side, array in (("left", left), ("right", right)):
            alone = array.reshape(*before, *array.shape[1:])
            missing = [(0, 0)] * alone.ndim
            missing[len(before) - 1] = (0, -before[-1] % devices)
            placed = place_rows(np.pad(alone, missing), mesh, axis=len(before) - 1)
            result.setdefault(name, {})[side] = placed
    return result, np.divide(kept, total, out=np.ones_like(total), where=total != 0)


def _require_finite(queries: np.ndarray, squares: np.ndarray) -> None:
    if (wrong := ~np.isfinite(squares)).any():
        raise NumericsError(
            f"the gradient of query {queries[wrong][0]} isn't finite; check the weights, or "
            "compute in float32 (`precision` fp32)"
        )


def query_bytes(metric: Metric, *, rank: int | None) -> int:
    """Bytes of one query, over all devices."""
    numbers = 0
    for members, o, i in metric.targets().values():
        numbers += (members or 1) * (o * i if rank is None else rank * (o + i))
    return numbers * jnp.dtype(metric.dtype).itemsize


def merged(*operands: Operands) -> Operands:
    """Several folds' operands as those of one."""
    names = dict.fromkeys(name for each in operands for name in each)
    return {
        name: {key: x for each in operands for key, x in each.get(name, {}).items()}
        for name in names
    }
