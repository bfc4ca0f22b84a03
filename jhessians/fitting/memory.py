"""What statistics and eigendecompositions take of the memory that is free."""

import math

from jhessians.capture.site import Site
from jhessians.devices.memory import fewest_of_hosts, free_on_host
from jhessians.linalg.eigen import usable_cores
from jhessians.linalg.symmetric import packed_shapes

EIGENDECOMPOSITION = 44
"""Bytes of an eigendecomposition for each entry of its matrix, as measured: float32 in, and float64
for the matrix, numpy's copy, LAPACK's workspace of two more, and the eigenvectors."""


SHARE = 0.5
"""Of a host's free memory, what eigendecompositions may take that go on side by side."""


def factor_numbers(site: Site) -> int:
    """Numbers in a linear's covariances, their eigenvectors and its corrected eigenvalues.

    Args:
        site: The linear; in a stack, one of its linears is counted.

    Returns:
        How many numbers, without an activation side that another linear keeps.
    """
    sides = [site.out_features, *([site.inputs] if site.owns_input else [])]
    factors = sum(d * d + sum(math.prod(shape) for shape in packed_shapes(d)) for d in sides)
    return factors + site.out_features * site.inputs


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
