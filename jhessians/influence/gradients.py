"""Gradients of documents, or of tokens, as rows of a store, made batch by batch and never all held.

A store's columns are those of the modules, layer by layer; of a module that is split, of its heads.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jhessians.capture.problem import Problem
from jhessians.capture.site import Operands, Site
from jhessians.data.batching import Batch
from jhessians.devices.hosts import fetch
from jhessians.errors import NumericsError
from jhessians.fitting.documents import DocumentPass
from jhessians.folds.joint_rows import JointRows
from jhessians.folds.low_rank_rows import LowRankRows
from jhessians.folds.rows import GradientRows
from jhessians.folds.token_rows import TokenRows
from jhessians.interop.gradient_store import GLOBAL
from jhessians.typing import PyTree

JOINT = "documents"  # what a pass calls the rows to which all linears add

SMALLEST_SQUARE = float(np.finfo(np.float32).eps) ** 2
"""Below this a row is not scaled to unit length but by a constant, as in torch bergson."""


class Unit(NamedTuple):
    """A module, or a head of one that is split, and where its rows are.

    Attributes:
        name: What it is called in a store.
        site: The linear that it belongs to.
        slot: Its place in a stack's arrays; None outside a stack.
        head: Which head; 0 of a module that isn't split.
        shape: Its gradient's, [out, in].
    """

    name: str
    site: Site
    slot: int | None
    head: int
    shape: tuple[int, int]


class StoredRows(NamedTuple):
    """Rows that follow one another in a store.

    Attributes:
        document: Whose they are.
        first: The number of the first one.
        values: [row, column].
    """

    document: int
    first: int
    values: Float[np.ndarray, "row column"]


class GradientPass:
    """The pass that makes a store's rows.

    Args:
        problem: Loss, model, linears and devices; no linear shares its input's statistics
            (`jhessians.capture.sites.unshared`).
        rows: How a gradient becomes a row.
        lengths: Tokens of each document.
        joint: Whether all modules add to one row, which needs a projection.
        rank: How many outer products are kept of each document's gradient; None for all of it.
        unit_normalize: Whether rows are scaled to unit length, over all modules.

    Attributes:
        sizes: Module → how many columns it has, in order.
        units: The modules, and heads of those that are split, in the same order.
        counts: How many rows each document has; 0 of one under two tokens in a store of tokens.
        square: The sum of squares of all gradients so far; only with `rank`.
        kept: That of what is kept of them.
    """

    def __init__(
        self,
        problem: Problem,
        rows: GradientRows,
        lengths: Int[np.ndarray, " document"],
        *,
        joint: bool = False,
        rank: int | None = None,
        unit_normalize: bool = False,
    ):
        self.problem, self.rows, self.joint, self.rank = problem, rows, joint, rank
        self.unit_normalize = unit_normalize
        self.units = units_of(problem.sites, rows)
        self.sizes = {unit.name: self._size(unit) for unit in self.units}
        if joint:
            assert rows.projection is not None
            self.sizes = {GLOBAL: rows.projection.dimension}
        tokens = np.maximum(lengths - 1, 0)
        self.counts = tokens if rows.tokens else np.ones_like(tokens)
        self._firsts = np.cumsum(self.counts) - self.counts
        self.square = self.kept = 0.0

    @property
    def width(self) -> int:
        """How many columns there are."""
        return sum(self.sizes.values())

    @property
    def row_count(self) -> int:
        """How many rows all documents have."""
        return int(self.counts.sum())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module → [out, in] of its gradient, in the columns' order."""
        return {unit.name: unit.shape for unit in self.units}

    def run(
        self,
        batches: Iterable[Batch],
        operands: Operands,
        *,
        advance: Callable[[int], None] = lambda positions: None,
    ) -> Iterator[Iterator[StoredRows]]:
        """The rows of each document that has some, batch by batch.

        Args:
            batches: This host's rows of each batch.
            operands: From `row_operands`.
            advance: Called when a batch is done, with how many of its positions counted.

        Yields:
            A batch's documents, one by one: the rows of all modules, the same on every host. They
                are taken before the next batch's.

        Raises:
            FoldError: If a fold's rows don't fit its shapes.
            NumericsError: If a loss or a gradient isn't finite.
        """
        # Rows of tokens have the batch's length in their shape: a pass for each.
        by_length = groupby(batches, key=lambda b: b.tokens.shape[1] if self.rows.tokens else 0)
        for length, group in by_length:
            passing = DocumentPass(self._fold(length), self.problem)
            for documents, rows in passing.run(group, operands=operands, advance=advance):
                yield self._of_batch(documents, jax.tree.map(fetch, rows))

    def _fold(self, positions: int) -> Any:
        if self.joint:
            return JointRows(self.rows)
        if self.rank is not None:
            return LowRankRows(self.rows, self.rank)
        return TokenRows(self.rows, positions) if self.rows.tokens else self.rows

    def _of_batch(self, documents: np.ndarray, rows: PyTree[np.ndarray]) -> Iterator[StoredRows]:
        for place, document in enumerate(documents.tolist()):
            if document < 0:
                continue
            count = int(self.counts[document])
            values = self._low_rank(rows, place) if self.rank else self._whole(rows, place, count)
            self._require_finite(values, document)
            if self.unit_normalize and not self.rank:
                squares = np.square(values.astype(np.float64)).sum(1, keepdims=True)
                values = (values * _unit_scale(squares)).astype(values.dtype)
            yield StoredRows(document, int(self._firsts[document]), values)

    def _whole(self, rows: PyTree[np.ndarray], place: int, count: int) -> np.ndarray:
        """One document's rows of all modules, [row, column]."""
        if self.joint:
            return rows[JOINT][place].reshape(-1, self.width)[:count]
        parts = []
        for unit in self.units:
            part = _member(rows[unit.site.name], unit.slot)[place]
            if unit.site.name in self.rows.split:
                part = part[..., unit.head, :]
            parts.append(part.reshape(-1, self.sizes[unit.name])[:count])
        return np.concatenate(parts, axis=1)

    def _low_rank(self, rows: PyTree[np.ndarray], place: int) -> np.ndarray:
        parts, square = [], 0.0
        for unit in self.units:
            here = {
                name: _member(array, unit.slot)[place][unit.head]
                for name, array in rows[unit.site.name].items()
            }
            parts += [here["g"].reshape(-1), here["a"].reshape(-1)]
            square += float(here["square"])
            self.kept += float(here["kept"])
        self.square += square
        values = np.concatenate(parts)[None]
        if self.unit_normalize:  # both vectors of a product get the root of the scale
            values *= np.sqrt(_unit_scale(np.array(square))).astype(values.dtype)
        return values

    def _size(self, unit: Unit) -> int:
        if self.rank is not None:
            return self.rank * sum(unit.shape)
        return self.rows.unit_size(unit.site)

    def _require_finite(self, values: np.ndarray, document: int) -> None:
        finite = np.isfinite(values)
        if finite.all():
            return
        column = int(np.argmin(finite.all(0)))
        ends = np.cumsum(list(self.sizes.values()))
        module = list(self.sizes)[int(np.searchsorted(ends, column, side="right"))]
        raise NumericsError(
            f"the gradient of document {document} at {module} is not finite; check the weights, or "
            "compute in float32 (`precision` fp32)"
        )


def units_of(sites: Mapping[str, Site], rows: GradientRows) -> list[Unit]:
    """All modules, those that are split by heads, layer by layer as torch bergson has them.

    A layer's experts follow one another, each with all its linears.

    Args:
        sites: The linears.
        rows: Says which are split.

    Returns:
        In the order of a store's columns.
    """
    units: list[Unit] = []
    places: dict[str, int] = {}
    for place, site in enumerate(sites.values()):
        places.setdefault(_experts(site.name), place)
        shape = site.out_features // rows.head_count(site), site.inputs
        for slot, module in zip(site.slots, site.module_names(), strict=True):
            for head, name in enumerate(rows.unit_names(site, module)):
                units.append(Unit(name, site, slot, head, shape))

    def place_of(unit: Unit) -> tuple[int, int, int]:
        expert = re.search(r"\.expert_(\d+)", unit.name)
        place = places[_experts(unit.site.name)]
        return _layer(unit.name), place, int(expert[1]) if expert else 0

    return sorted(units, key=place_of)


def _experts(name: str) -> str:
    """What all experts of a layer have in common of their names; a whole name elsewhere."""
    return name.partition(".expert_{expert}")[0]


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _member(array: np.ndarray, slot: int | None) -> np.ndarray:
    return array if slot is None else array[slot]


def _unit_scale(squares: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(np.maximum(squares, SMALLEST_SQUARE))
