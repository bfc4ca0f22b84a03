"""The covariances of a fit as matrices, and what their eigenpairs look like."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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
from jhessians.linalg.symmetric import unpack
from jhessians.typing import Array, DTypeLike, PyTree

SIDES: tuple[Literal["activation", "gradient"], ...] = ("activation", "gradient")


class Matrix(NamedTuple):
    """One covariance among the statistics: of which linears, and where it lies in a stack."""

    site: Site
    side: Literal["activation", "gradient"]
    slot: int | None

    @property
    def dimension(self) -> int:
        """d, how many rows and columns it has."""
        return self.site.inputs if self.side == "activation" else self.site.out_features

    @property
    def name(self) -> str:
        """For messages."""
        return f"the {self.side} covariance of {self.site.module_names()[self.slot or 0]}"

    def read(self, statistics: Statistics) -> np.ndarray:
        """Bring the matrix to every host; with several hosts, all of them call this.

        Args:
            statistics: Packed factors, as a `FactorFold` sums them.

        Returns:
            The whole symmetric matrix, [d, d].
        """
        take = (lambda x: x) if self.slot is None else (lambda x: x[self.slot])
        return unpack((fetch(block, take) for block in self.stacks(statistics)), self.dimension)

    def stacks(self, statistics: Statistics) -> tuple[Array, ...]:
        """The packed arrays that hold it, those of the whole stack.

        Args:
            statistics: As for `read`.

        Returns:
            Its blocks, [layer, row, column] in stacks, else [row, column].
        """
        blocks: tuple[Array, ...] = statistics[self.site.name][self.side]
        return blocks


def covariance_matrices(sites: Mapping[str, Site]) -> list[Matrix]:
    """Every distinct matrix of a fit.

    Args:
        sites: The linears.

    Returns:
        Two for each module, sites in order; but one activation covariance for all that read the
        same input.
    """
    return [
        Matrix(site, side, slot)
        for site in sites.values()
        for side in SIDES
        if side == "gradient" or site.owns_input
        for slot in site.slots
    ]


def in_order(sites: Mapping[str, Site]) -> list[Matrix]:
    """All matrices in the order in which they are decomposed, the largest first.

    Args:
        sites: The linears.

    Returns:
        As from `covariance_matrices`; those of one stack follow one another.
    """
    return sorted(covariance_matrices(sites), key=lambda matrix: -matrix.dimension)


@dataclass(frozen=True)
class TermCounts:
    """How many terms were summed: positions, or documents, by the fold's unit.

    Attributes:
        total: By every linear that reads all of them.
        routed: By each expert, [member], by site; sites without an entry read all.
    """

    total: int
    routed: Mapping[str, np.ndarray] = field(default_factory=dict)

    def of(self, site: Site, slot: int | None) -> int:
        """How many terms one linear has.

        Args:
            site: The linear's.
            slot: Its place in the site's arrays; None outside a stack.

        Returns:
            Terms; at least 1 of an expert, so that one that nobody chose has means of zero.
        """
        if site.name not in self.routed or slot is None:
            return self.total
        return max(1, int(self.routed[site.name][slot]))


class Eigenbases(NamedTuple):
    """Eigenpairs of all covariances, by site and side; an input's are kept by its `input_site`.

    Attributes:
        vectors: [layer, row, d] in stacks, else [row, d]; columns are eigenvectors, rows are
            padded and sharded: the operands of `EigenvalueCorrection`.
        values: [layer, d] or [d], ascending, on the host.
    """

    vectors: dict[str, dict[str, Array]]
    values: dict[str, dict[str, np.ndarray]]


def eigenvector_shapes(problem: Problem, dtype: DTypeLike) -> PyTree[jax.ShapeDtypeStruct]:
    """What `Eigenbases.vectors` will look like, before there are any.

    Args:
        problem: Linears and mesh.
        dtype: Number format of the eigenvectors.

    Returns:
        Shapes, with shardings if there is a mesh, by site and side.
    """
    devices = problem.mesh.size if problem.mesh else 1
    shapes: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for site, side, _ in covariance_matrices(problem.sites):
        d = site.inputs if side == "activation" else site.out_features
        stack = () if site.members is None else (len(site.members),)
        shape = (*stack, d + -d % devices, d)
        shapes.setdefault(site.name, {})[side] = jax.ShapeDtypeStruct(shape, dtype)
    return shaped_rows(problem.sites, shapes, problem.mesh)


def place_rows(array: np.ndarray, mesh: Mesh | None, *, axis: int) -> Array:
    """Put an array on the devices, its rows padded with zeros and spread over them.

    Args:
        array: The whole array, the same on every host.
        mesh: The devices; None for a single one.
        axis: The axis of the rows.

    Returns:
        The array; on a mesh with a multiple of the devices as rows, sharded along `axis`.
    """
    if mesh is None:
        return jnp.asarray(array)
    shape = list(array.shape)
    shape[axis] += -shape[axis] % mesh.size
    spec = P(*[None] * axis, axis_names(mesh))

    def rows(index: Any) -> np.ndarray:
        found = array[index]
        width = [(0, 0)] * array.ndim
        width[axis] = (0, len(range(*index[axis].indices(shape[axis]))) - found.shape[axis])
        return np.pad(found, width) if any(width[axis]) else found

    return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, spec), rows)
