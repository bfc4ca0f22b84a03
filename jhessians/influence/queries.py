"""Queries on the devices: gradients after the inverse Hessian, in groups that memory holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jhessians.capture.fold import Matrices
from jhessians.capture.problem import Problem
from jhessians.capture.site import Operands, Site
from jhessians.capture.traversal import row_shardings
from jhessians.devices.hosts import fetch
from jhessians.errors import DatasetError, NumericsError
from jhessians.fitting.documents import DocumentPass
from jhessians.fitting.eigenbases import place_rows
from jhessians.folds.queries import Queries
from jhessians.linalg.low_rank import truncate
from jhessians.typing import Array, DTypeLike, Float, PyTree


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
        problem: Loss, model, linears and devices.
        count: Queries of a group.
        curvature: The operands of `Queries`; None for plain gradients.
        rank: How many outer products are kept of each query and linear; None for all.
        unit_normalize: Whether each query is divided by the root of its gᵀ H⁻¹ g.
        aggregate: Whether all are added up to one, with the weight that `run` is given.
        dtype: Number format.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        count: int,
        curvature: Operands | None,
        rank: int | None = None,
        unit_normalize: bool = False,
        aggregate: bool = False,
        dtype: DTypeLike = jnp.float32,
    ):
        self.problem, self.count, self.curvature, self.rank = problem, count, curvature, rank
        self.dtype = dtype
        # What is added up first loses its rank afterwards.
        fold = Queries(curvature is not None, None if aggregate else rank, dtype)
        self._aggregate, self._fold, self._unit = aggregate, fold, unit_normalize
        self._pass = DocumentPass(fold, problem, finish=self._finish)
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
            DatasetError: If a query has no gradient: nothing in it is predicted.
        """
        operands = self._zeros()
        own, kept = np.zeros(self.count), np.ones(self.count)
        for documents, rows in self._pass.run(batches, operands=self.curvature):
            sums = jax.tree.map(fetch, rows["sums"])
            real = documents >= 0
            for number, value in zip(documents[real], sums["square"][real], strict=True):
                _require_sound(number, value)
            places = np.where(real, 0 if self._aggregate else documents, -1).astype(np.int32)
            operands = self._place(operands, rows["matrices"], places, np.float32(weight))
            if not self._aggregate:
                own[documents[real]] = sums["self"][real]
                kept[documents[real]] = sums["kept"][real] / sums["square"][real]
        if self._aggregate and self.rank is not None:
            operands, kept[:] = _truncated(self.problem, operands, self.rank)
        return QueryGroup(operands, own, kept)

    def _finish(self, rows: PyTree[Array], _: Any) -> PyTree[Array]:
        """Add up the linears' numbers, and give unit length where that is wanted."""
        sums: dict[str, Array] = {
            name: sum(
                rows[key][name] if site.members is None else rows[key][name].sum(0)
                for key, site in self.problem.sites.items()
            )
            for name in ("self", "square", "kept")
        }  # type: ignore[misc]
        names = [name for name in ("matrix", "left", "right") if name in next(iter(rows.values()))]
        matrices = {key: {name: rows[key][name] for name in names} for key in rows}
        if self._unit:
            length = jnp.sqrt(sums["self"])
            factor = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
            scaled = "right" if "right" in names else "matrix"
            for key in matrices:
                matrices[key][scaled] = matrices[key][scaled] * factor[:, None, None]
        return {"sums": sums, "matrices": matrices}

    def _zeros(self) -> PyTree[Array]:
        def zeros() -> PyTree[Array]:
            return {name: self._buffers(site) for name, site in self.problem.sites.items()}

        return jax.jit(zeros, out_shardings=self._shardings())()

    def _buffers(self, site: Site) -> dict[str, Any]:
        mesh = self.problem.mesh
        devices = mesh.size if mesh else 1
        stack = () if site.members is None else (len(site.members),)
        o, i = site.out_features, site.inputs
        if self._fold.rank is None:
            shape = (*stack, self.count, o + -o % devices, i)
            return {"queries": Matrices(jnp.zeros(shape, self.dtype))}
        count = self.count + -self.count % devices
        return {
            name: jnp.zeros((*stack, count, self._fold.rank, d), self.dtype)
            for name, d in (("left", o), ("right", i))
        }

    def _shardings(self) -> Any:
        if self.problem.mesh is None:
            return None
        sites = self.problem.sites
        shapes = jax.eval_shape(lambda: {name: self._buffers(site) for name, site in sites.items()})
        return row_shardings(sites, shapes, self.problem.mesh)

    def _placed(
        self, operands: PyTree[Array], rows: PyTree[Array], places: Array, weight: Array
    ) -> PyTree[Array]:
        """Add each row in its query's place; those of place -1 nowhere."""

        def placed(site: Site, buffer: Array, new: Array) -> Array:
            axis = 0 if site.members is None else 1
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
        for name, site in self.problem.sites.items():
            here, new = operands[name], rows[name]
            if "matrix" in new:
                values = placed(site, here["queries"].values, new["matrix"])
                result[name] = {"queries": Matrices(values)}
            else:
                result[name] = {side: placed(site, here[side], new[side]) for side in here}
        return result


def _truncated(problem: Problem, operands: Operands, rank: int) -> tuple[Operands, float]:
    """One query's matrices as products of low rank, and the share of its square that they keep."""
    total = kept = 0.0
    result: dict[str, dict[str, Any]] = {}
    devices = problem.mesh.size if problem.mesh else 1
    for name, here in operands.items():
        matrices = here["queries"].values
        o, i = problem.sites[name].out_features, problem.sites[name].inputs
        many = fetch(matrices)[..., :o, :].reshape(-1, o, i)
        left, right = jax.jit(lambda m: lax.map(lambda x: truncate(x, rank), m))(many)
        total += float(np.square(many).sum())
        kept += float(jnp.square(right).sum())
        before = matrices.shape[:-2]
        for side, array in (("left", left), ("right", right)):
            alone = np.asarray(array).reshape(*before, *array.shape[1:])
            missing = [(0, 0)] * alone.ndim
            missing[len(before) - 1] = (0, -1 % devices)
            placed = place_rows(np.pad(alone, missing), problem.mesh, axis=len(before) - 1)
            result.setdefault(name, {})[side] = placed
    return result, kept / total if total else 1.0


def _require_sound(number: int, square: float) -> None:
    if not np.isfinite(square):
        raise NumericsError(
            f"the gradient of query {number} isn't finite; check the weights, or compute in "
            "float32 (`precision` fp32)"
        )
    if square == 0:
        raise DatasetError(
            f"query {number} has no gradient: none of its tokens is predicted; give queries of "
            "two tokens or more, with a completion where there is a completion column"
        )


def query_bytes(sites: Iterable[Site], *, rank: int | None, itemsize: int) -> int:
    """Bytes of one query, over all devices."""
    numbers = 0
    for site in sites:
        o, i = site.out_features, site.inputs
        numbers += len(site.slots) * (o * i if rank is None else rank * (o + i))
    return numbers * itemsize
