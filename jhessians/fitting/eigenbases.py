"""What lies between the passes of a fit: the covariances' eigendecompositions."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.capture.problem import Problem
from jhessians.capture.site import Site, Statistics
from jhessians.capture.traversal import shaped_rows
from jhessians.devices.hosts import fetch
from jhessians.devices.mesh import axis_names
from jhessians.errors import NumericsError
from jhessians.fitting.memory import eigendecompositions_at_once
from jhessians.linalg.eigen import (
    Eigen,
    eigendecompose,
    ordered_map,
    share_by_cost,
    usable_cores,
)
from jhessians.linalg.symmetric import unpack
from jhessians.typing import Array, DTypeLike, PyTree

Item = TypeVar("Item")
Result = TypeVar("Result")

KINDS: tuple[Literal["activation", "gradient"], ...] = ("activation", "gradient")


class Matrix(NamedTuple):
    """One covariance among the statistics: of which linears, and where it lies in a stack."""

    site: Site
    kind: Literal["activation", "gradient"]
    slot: int | None

    @property
    def dimension(self) -> int:
        return self.site.inputs if self.kind == "activation" else self.site.out_features

    @property
    def name(self) -> str:
        """For messages."""
        return f"the {self.kind} covariance of {self.site.module_names()[self.slot or 0]}"

    def read(self, statistics: Statistics) -> np.ndarray:
        """The whole symmetric matrix, on the host."""
        blocks = statistics[self.site.name][self.kind]
        take = (lambda x: x) if self.slot is None else (lambda x: x[self.slot])
        return unpack([fetch(block, take) for block in blocks], self.dimension)


def covariance_matrices(sites: Mapping[str, Site]) -> list[Matrix]:
    """Every distinct matrix, sites in order; an input that several linears read counts once."""
    return [
        Matrix(site, kind, slot)
        for site in sites.values()
        for kind in KINDS
        if kind == "gradient" or site.owns_input
        for slot in site.slots
    ]


@dataclass(frozen=True)
class PositionCounts:
    """How many positions were summed.

    Attributes:
        total: By every linear that reads all of them.
        routed: By each expert, [member], by site; for sites without an entry, as by the others.
    """

    total: int
    routed: Mapping[str, np.ndarray] = field(default_factory=dict)

    def of(self, site: Site, slot: int | None) -> int:
        """By one linear; at least 1, so that an expert that nobody chose has means of zero."""
        if site.name not in self.routed or slot is None:
            return self.total
        return max(1, int(self.routed[site.name][slot]))


class Eigenbases(NamedTuple):
    """Eigenpairs of all covariances, by site and kind; an input's are kept by its `input_site`.

    Attributes:
        vectors: [layer, row, d] in stacks, else [row, d]; columns are eigenvectors, rows are
            padded and sharded: the operands of `EigenvalueCorrection`.
        values: [layer, d] or [d], ascending, on the host.
    """

    vectors: dict[str, dict[str, Array]]
    values: dict[str, dict[str, np.ndarray]]


def eigenvector_shapes(problem: Problem, dtype: DTypeLike) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and shardings of `Eigenbases.vectors`, before there are any."""
    devices = problem.mesh.size if problem.mesh else 1
    shapes: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for site, kind, _ in covariance_matrices(problem.sites):
        d = site.inputs if kind == "activation" else site.out_features
        stack = () if site.members is None else (len(site.members),)
        shape = (*stack, d + -d % devices, d)
        shapes.setdefault(site.name, {})[kind] = jax.ShapeDtypeStruct(shape, dtype)
    return shaped_rows(problem.sites, shapes, problem.mesh)


def eigendecompose_covariances(
    problem: Problem,
    statistics: Statistics,
    *,
    positions: PositionCounts,
    dtype: np.dtype,
    advance: Callable[[], None] = lambda: None,
) -> Eigenbases:
    """Eigenpairs of every covariance's mean over positions, the work divided among hosts.

    Args:
        problem: Sites and mesh.
        statistics: Of `Covariance`; emptied on the way, so that a covariance's memory is free
            once all of its stack is on its way to an eigensolver.
        positions: How many positions were summed.
        dtype: Of the result.
        advance: Called when a matrix is done.

    Raises:
        NumericsError: If a matrix isn't finite; it is named.
    """
    order = sorted(covariance_matrices(problem.sites), key=lambda m: -m.dimension)
    hosts = jax.process_count()
    owners = share_by_cost([m.dimension for m in order], hosts)
    pending = Counter((m.site.name, m.kind) for m in order)
    remaining = pending.copy()

    def matrices() -> Iterator[tuple[Matrix, np.ndarray | None]]:
        for matrix, owner in zip(order, owners, strict=True):
            whole = matrix.read(statistics)
            remaining[matrix.site.name, matrix.kind] -= 1
            if not remaining[matrix.site.name, matrix.kind]:
                del statistics[matrix.site.name][matrix.kind]
            yield matrix, whole if owner == jax.process_index() else None

    def solve(task: tuple[Matrix, np.ndarray | None]) -> Eigen | None:
        matrix, whole = task
        if whole is None:
            return None
        try:
            return eigendecompose(matrix.name, whole, positions.of(matrix.site, matrix.slot), dtype)
        except NumericsError:
            if hosts == 1:
                raise
            # The others wait for a result, and see from this one that there is none.
            return Eigen(*(np.full((matrix.dimension,) * n, np.nan, dtype) for n in (1, 2)))

    solved = solved_in_order(solve, matrices(), order[0].dimension)
    bases = Eigenbases({}, {})
    stacks: dict[tuple[str, str], Eigen] = {}
    for matrix, owner, pair in zip(order, owners, solved, strict=True):
        site, kind, slot = matrix
        values, vectors = from_owner(pair, owner, matrix.dimension, dtype)
        if not np.isfinite(values).all():
            raise NumericsError(
                f"{matrix.name} holds NaN or infinity, or has no eigendecomposition; expected "
                "finite numbers: check the weights, or use --precision fp32"
            )
        key = (site.name, kind)
        if slot is None:
            stacks[key] = Eigen(values, vectors)
        else:
            stack = stacks.setdefault(key, _empty_stack(len(site.members or ()), values, vectors))
            stack.values[slot], stack.vectors[slot] = values, vectors
        pending[key] -= 1
        if not pending[key]:
            done = stacks.pop(key)
            bases.values.setdefault(site.name, {})[kind] = done.values
            rows = place_rows(done.vectors, problem.mesh, axis=done.vectors.ndim - 2)
            bases.vectors.setdefault(site.name, {})[kind] = rows
        advance()
    return bases


def solved_in_order(
    solve: Callable[[Item], Result], tasks: Iterable[Item], dimension: int
) -> Iterator[Result]:
    """Eigendecompositions as tasks, as many side by side as cores and memory allow.

    Args:
        solve: Of a task.
        tasks: In the same order on every host; each solves its own and passes over the others'.
        dimension: Rows of the largest matrix.
    """
    workers = eigendecompositions_at_once(dimension)
    return ordered_map(
        solve, tasks, workers=workers, window=(workers + 1) * jax.process_count(),
        blas_threads=max(1, usable_cores() // workers),
    )  # fmt: skip


def _empty_stack(layers: int, *entries: np.ndarray) -> Eigen:
    return Eigen(*(np.empty((layers, *x.shape), x.dtype) for x in entries))


def from_owner(pair: Eigen | None, owner: int, d: int, dtype: np.dtype) -> Eigen:
    """The result of the host that computed it, on every host.

    Args:
        pair: The result, on that host.
        owner: That host.
        d: Rows of the matrix.
        dtype: Of the result.
    """
    if jax.process_count() == 1:
        assert pair is not None
        return pair
    from jax.experimental import multihost_utils

    mine = pair or Eigen(np.empty(d, dtype), np.empty((d, d), dtype))
    shared = multihost_utils.broadcast_one_to_all(mine, is_source=owner == jax.process_index())
    return Eigen(*(np.asarray(x) for x in shared))


def place_rows(array: np.ndarray, mesh: Mesh | None, *, axis: int) -> Array:
    """An array whose rows, along `axis`, are padded and spread over the mesh."""
    if mesh is None:
        return jnp.asarray(array)
    width = [(0, 0)] * array.ndim
    width[axis] = (0, -array.shape[axis] % mesh.size)
    padded = np.pad(array, width)
    spec = P(*[None] * axis, axis_names(mesh))
    return jax.make_array_from_callback(
        padded.shape, NamedSharding(mesh, spec), lambda index: padded[index]
    )
