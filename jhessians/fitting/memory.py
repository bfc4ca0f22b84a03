"""What statistics and eigendecompositions take of the memory that is free."""

from collections.abc import Iterable
from typing import NamedTuple

from jhessians.capture.site import Site
from jhessians.devices.memory import fewest_of_hosts, free_on_host
from jhessians.linalg.eigen import usable_cores
from jhessians.linalg.symmetric import packed_shapes

EIGENDECOMPOSITION = 44
"""Bytes of an eigendecomposition for each entry of its matrix, as measured: float32 in, and float64
for the matrix, numpy's copy, LAPACK's workspace of two more, and the eigenvectors."""


SHARE = 0.5
"""Of a host's free memory, what eigendecompositions may take that go on side by side."""


class StageBytes(NamedTuple):
    """Bytes that a fit's arrays take on each device, by stage; activations and weights come on top.

    Attributes:
        covariances: In the first pass: packed sums.
        between: In the eigendecompositions, at the moment of most: the sums that are still to be
            read, the eigenvectors that are there, and the matrices on their way.
        correction: In the second pass: eigenvectors, and sums of squares in their bases.
    """

    covariances: int
    between: int
    correction: int


def stage_bytes(
    sites: Iterable[Site], itemsize: int, *, devices: int = 1, hosts: int = 1
) -> StageBytes:
    """What covariances, eigenvectors and corrected eigenvalues take, by stage.

    Args:
        sites: The linears, which are fitted at once.
        itemsize: Bytes of a number.
        devices: Over which rows are spread, of all hosts.
        hosts: Between which matrices move to be decomposed.

    Returns:
        Bytes on each device.
    """
    return counted_stage_bytes(
        ((site, len(site.slots)) for site in sites), itemsize, devices=devices, hosts=hosts
    )


def counted_stage_bytes(
    counted: Iterable[tuple[Site, int]], itemsize: int, *, devices: int, hosts: int
) -> StageBytes:
    """As `stage_bytes`, of some members of each stack.

    Args:
        counted: Linears, each with how many of its members there are.
        itemsize: Bytes of a number.
        devices: Over which rows are spread.
        hosts: Between which matrices move.

    Returns:
        Bytes on each device.
    """

    def spread(*shapes: tuple[int, int]) -> int:
        return sum(-(-rows // devices) * columns for rows, columns in shapes) * itemsize

    stacks: list[tuple[int, int]] = []
    squares = 0
    for site, members in counted:
        sides = [site.out_features, *([site.inputs] if site.owns_input else [])]
        stacks += [(d, members) for d in sides]
        squares += members * spread((site.out_features, site.inputs))
    remaining = covariances = sum(n * spread(*packed_shapes(d)) for d, n in stacks)
    vectors, most = 0, covariances
    for d, members in sorted(stacks, reverse=True):  # the largest are decomposed first
        vectors += members * spread((d, d))
        most = max(most, remaining + vectors + _moving(d, itemsize, devices, hosts))
        remaining -= members * spread(*packed_shapes(d))
    return StageBytes(covariances, most, vectors + squares)


def _moving(d: int, itemsize: int, devices: int, hosts: int) -> int:
    """Bytes on a device of matrices on their way to or from a host: sent, received, and in rows."""
    whole = d * d * itemsize * hosts // devices
    return 3 * whole if hosts > 1 else whole


def gram_numbers(site: Site, projection_dim: int) -> int:
    """Numbers in the dense Grams of a linear's gradients, of all its modules.

    Args:
        site: The linear.
        projection_dim: p of a projected gradient [p, p]; 0 if they are whole.

    Returns:
        How many numbers.
    """
    row = projection_dim**2 or site.out_features * site.inputs
    return row**2 * len(site.slots)


def eigendecompositions_at_once(dimension: int) -> int:
    """How many matrices each host may eigendecompose side by side.

    One for each core, or as many as there is memory for.

    Args:
        dimension: Rows of the largest of the matrices.

    Returns:
        At least 1; the fewest of all hosts, which take turns.
    """
    fit = SHARE * free_on_host() / (EIGENDECOMPOSITION * dimension**2)
    return max(1, fewest_of_hosts(min(usable_cores(), int(fit))))
