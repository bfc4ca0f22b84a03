"""One curvature out of two: λ H_query + (1 - λ) H_index, with λ from their spectra.

All modules' eigenvalues are pooled and sorted, σ_1 ≥ σ_2 ≥ …, for each of the two. λ is where the
scaled spectra cross at component k,

    λ σ_query[k] = (1 - λ) σ_index[k],   so   λ = σ_index[k] / (σ_query[k] + σ_index[k]),

so that the queries' Hessian outweighs the index's just in the queries' k strongest directions.
These hold what all queries share, such as their template, and the inverse then weighs them down.

References:
    Chang et al. 2024, arXiv:2410.17413, section A.1.3.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

WITHOUT_EIGENVALUES = 0.99
"""λ where both spectra are zero at component k: the paper's value for its larger set of queries."""


class Mixing(NamedTuple):
    """How two curvatures are mixed.

    Attributes:
        coefficient: λ, the query's share, in [0, 1].
        component: k, counted from 1; at most the number of eigenvalues.
        query_eigenvalue: σ_query[k].
        index_eigenvalue: σ_index[k].
    """

    coefficient: float
    component: int
    query_eigenvalue: float
    index_eigenvalue: float


def mixing(
    query: Float[np.ndarray, " d"], index: Float[np.ndarray, " d"], *, components: int
) -> Mixing:
    """The coefficient at which the spectra cross.

    Args:
        query: Eigenvalues of all of the query's modules, in any order; negative ones, which are
            rounding, count as zero.
        index: Eigenvalues of all of the index's modules, as many.
        components: k, how many directions to weigh down; 0 takes the query alone.

    Returns:
        The query's share, from 0 to 1, with the two eigenvalues that it follows from.

    Raises:
        ValueError: If there are no eigenvalues, or `components` is negative.
    """
    if components < 0 or not query.size:
        raise ValueError(f"components {components} of {query.size}; expected 0 of 1 or more")
    component = min(max(components, 1), query.size)
    query_value, index_value = (_largest(values, component) for values in (query, index))
    if components == 0:
        coefficient = 1.0
    elif query_value + index_value == 0:
        coefficient = WITHOUT_EIGENVALUES
    else:
        coefficient = index_value / (query_value + index_value)
    return Mixing(coefficient, component, query_value, index_value)


def mixed(
    query: Float[np.ndarray, "d d"], index: Float[np.ndarray, "d d"], coefficient: float
) -> Float[np.ndarray, "d d"]:
    """λ H_query + (1 - λ) H_index, in the query's type."""
    share = query.dtype.type(coefficient)
    rest = query.dtype.type(1 - coefficient)
    mixture: np.ndarray = query * share + index.astype(query.dtype) * rest
    return mixture


def _largest(values: Float[np.ndarray, " d"], k: int) -> float:
    """The k-th largest value, at least zero; counted from 1."""
    clamped = np.maximum(values.astype(np.float64), 0)
    return float(np.partition(clamped, -k)[-k])
