"""Autocorrelation Hessians in memory: one pass over the data, then eigendecompositions."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jhessians.capture.problem import Problem
from jhessians.capture.site import Site, Statistics
from jhessians.devices.hosts import fetch
from jhessians.fitting.checkpoints import Checkpoints
from jhessians.fitting.eigenbases import place_rows
from jhessians.fitting.eigensolver import Task, decompose, seconds_of
from jhessians.fitting.passes import run_pass
from jhessians.fitting.reporting import Reporter, Silent
from jhessians.folds.gram import Gram, JointGram
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer, Normalizer
from jhessians.folds.rows import GradientRows
from jhessians.folds.second_moment import stack_normalizers
from jhessians.linalg.eigen import Eigen
from jhessians.typing import Array, PyTree

STORED = np.dtype(np.float32)  # bergson's, whatever the type of the sums


class Autocorrelations(NamedTuple):
    """What is known of every module, or of every head of those that are split.

    Attributes:
        hessians: Name → mean outer product of gradient rows, [d, d].
        eigen: Name → its eigenpairs, values ascending.
    """

    hessians: dict[str, Float[np.ndarray, "d d"]]
    eigen: dict[str, Eigen]


def fit_autocorrelations(
    problem: Problem,
    batches: Iterable[PyTree[np.ndarray]],
    rows: GradientRows,
    *,
    count: int,
    joint: bool = False,
    normalizers: Mapping[str, Normalizer] | None = None,
    progress: Reporter | None = None,
    positions: int | None = None,
    kept: Checkpoints | None = None,
) -> Autocorrelations:
    """Grams of gradient rows divided by their number, with eigenpairs.

    Args:
        problem: Loss, model and linears, none of which shares its input's statistics
            (`jhessians.capture.sites.unshared`).
        batches: With a mesh, this host's rows.
        rows: How a gradient becomes a row.
        count: How many rows there are: documents (those without a gradient included) or tokens.
        joint: Whether the modules' projections are summed, and there is one Hessian, "joint".
        normalizers: Module's full name → what its gradients are divided by; none by default.
        progress: Where stages are shown.
        positions: How many positions count in all batches, for the progress.
        kept: Where the state is saved, and from where an earlier fit is continued.

    Returns:
        Hessians and eigenpairs by the names of modules or heads, in float32 on every host.

    Raises:
        CheckpointError: If a module has no normalizer that fits, while others have.
        NumericsError: If a loss or a Gram isn't finite.
    """
    progress, kept = progress or Silent(), kept or Checkpoints()
    fold = JointGram(rows) if joint else Gram(rows)
    operands = row_operands(problem, rows, joint=joint, normalizers=normalizers)
    matrices = list(_matrices(problem.sites, rows, joint))
    with progress.stage("Grams", positions, "positions") as stage:
        statistics = run_pass(
            fold, problem, batches, dtype=rows.dtype, operands=operands,
            advance=stage.advance,
            kept=kept.series("grams", ahead=seconds_of(matrix.size for matrix in matrices)),
        )  # fmt: skip
    with progress.stage("Eigendecompositions", len(matrices), "matrices") as stage:
        result = Autocorrelations({}, {})

        def read(matrix: _Matrix) -> Float[np.ndarray, "d d"]:
            total = matrix.read(statistics).astype(np.float64)
            result.hessians[matrix.name] = ((total + total.T) / (2 * count)).astype(STORED)
            return total

        series = kept.series("eigenpairs")
        found: list[tuple[np.ndarray, np.ndarray]] = []
        if saved := series.load(lambda position: [(STORED, STORED)] * position["matrices"]):
            found = saved.arrays
            stage.advance(len(found))
            for matrix in matrices[: len(found)]:
                read(matrix)
        rest = matrices[len(found) :]
        tasks = [Task(f"the autocorrelation of {each.name}", each.size, count) for each in rest]
        for pair in decompose(tasks, lambda number: read(rest[number]), STORED):
            found.append((pair.values, pair.vectors))
            stage.advance()
            if series.due():
                series.save({"matrices": len(found)}, found)
        result.eigen.update(
            (matrix.name, Eigen(*pair)) for matrix, pair in zip(matrices, found, strict=True)
        )
    return result


def row_operands(
    problem: Problem,
    rows: GradientRows,
    *,
    joint: bool = False,
    normalizers: Mapping[str, Normalizer] | None = None,
) -> dict[str, dict[str, Any]]:
    """The operands that `GradientRows` needs: keys of random matrices, and normalizers.

    Arguments and errors are those of `fit_autocorrelations`.

    Returns:
        Site's name → `keys` if gradients are projected and `normalizer` if there are some, in
        stacks with a leading member axis, on the devices.
    """
    stacked = stack_normalizers(problem.sites, normalizers) if normalizers else {}
    operands: dict[str, dict[str, Any]] = {}
    for name, site in problem.sites.items():
        axis = 0 if site.members is None else 1

        def place(x: Array | np.ndarray, axis: int = axis) -> Array:
            return place_rows(np.asarray(x), problem.mesh, axis=axis)

        here = operands.setdefault(name, {})
        if name in stacked:
            here["normalizer"] = jax.tree.map(place, stacked[name])
        if rows.projection is not None:
            keys = [
                rows.global_keys(site, module)
                if joint
                else rows.matrix_keys(site, module, stacked.get(name))
                for module in site.module_names()
            ]
            here["keys"] = place(keys[0] if site.members is None else np.stack(keys))
    return operands


def row_operand_shapes(
    problem: Problem, rows: GradientRows, *, joint: bool, normalizer: str
) -> dict[str, dict[str, Any]]:
    """Shapes of what `row_operands` makes.

    Args:
        problem: Linears and mesh.
        rows: How a gradient becomes a row.
        joint: Whether the modules' projections are summed.
        normalizer: `adam`, `adafactor` or `none`.

    Returns:
        By site, rows padded to the devices.
    """
    devices = problem.mesh.size if problem.mesh else 1
    found: dict[str, dict[str, Any]] = {}
    for name, site in problem.sites.items():
        stack = () if site.members is None else (len(site.members),)

        def shape(*axes: int, dtype: Any = np.float32, stack: Any = stack) -> Any:
            first = axes[0] + -axes[0] % devices
            return jax.ShapeDtypeStruct((*stack, first, *axes[1:]), dtype)

        here, o, i = found.setdefault(name, {}), site.out_features, site.in_features
        bias = shape(o) if site.ones else None
        moments: Normalizer | None = None
        if normalizer == "adam":
            moments = here["normalizer"] = AdamNormalizer(shape(o, i), bias)
        elif normalizer == "adafactor":
            moments = here["normalizer"] = AdafactorNormalizer(shape(o), shape(i), bias)
        if rows.projection is not None:
            module = site.module_names()[0]
            keys = (
                rows.global_keys(site, module) if joint else rows.matrix_keys(site, module, moments)
            )
            here["keys"] = shape(*keys.shape, dtype=keys.dtype)
    return found


class _Matrix(NamedTuple):
    """One Gram: its name, and where it lies among the statistics."""

    name: str
    key: str
    slot: int | None
    start: int
    size: int

    def read(self, statistics: Statistics) -> Float[np.ndarray, "d d"]:
        """The sum, on every host."""
        rows = slice(self.start, self.start + self.size)

        def take(x: Any) -> Any:
            return x[rows] if self.slot is None else x[self.slot, rows]

        return fetch(statistics[self.key], take)


def _matrices(sites: Mapping[str, Site], rows: GradientRows, joint: bool) -> Iterator[_Matrix]:
    if joint:
        assert rows.projection is not None
        yield _Matrix(JointGram.joint, JointGram.joint, None, 0, rows.projection.dimension)
        return
    for site in sites.values():
        size = rows.unit_size(site)
        for slot, module in zip(site.slots, site.module_names(), strict=True):
            for head, name in enumerate(rows.unit_names(site, module)):
                yield _Matrix(name, site.name, slot, head * size, size)
