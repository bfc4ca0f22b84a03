"""The best approximation of a matrix by a few outer products.

`truncate` finds it nearly, in products and small QRs (Halko, Martinsson & Tropp 2011,
arXiv:0909.4061, algorithm 4.4): random vectors are multiplied with the matrix and its transpose in
turn, until they span its largest singular vectors. `truncate_sum` finds it exactly, where a matrix
is a sum of few outer products already.
"""

import jax
import jax.numpy as jnp

from jhessians.typing import Array, Float

OVERSAMPLING = 8
"""Vectors more than the rank asks for; they make the span safe."""

ITERATIONS = 3
"""Products with the matrix and its transpose. After these what is kept of a gradient's square
differs from the truncated SVD's by less than a thousandth."""


def truncate(
    matrix: Float[Array, "o i"], rank: int
) -> tuple[Float[Array, "r o"], Float[Array, "r i"]]:
    """A matrix as the sum of `rank` outer products, about its largest singular ones.

    Args:
        matrix: Any.
        rank: How many to keep; more than the matrix has rows or columns are zeros.

    Returns:
        left: Orthonormal vectors, [rank, out], the largest singular value's first.
        right: [rank, in], with Σ_r left_r right_rᵀ about the matrix; the sum of its squares is
            that of the approximation.
    """
    o, i = matrix.shape
    width = min(rank + OVERSAMPLING, o, i)
    if width < min(o, i):
        basis = jax.random.normal(jax.random.key(0, impl="threefry2x32"), (i, width), matrix.dtype)
        basis = jnp.linalg.qr(matrix @ basis)[0]
        for _ in range(ITERATIONS):
            basis = jnp.linalg.qr(matrix @ jnp.linalg.qr(matrix.T @ basis)[0])[0]
    elif o <= i:
        basis = jnp.eye(o, dtype=matrix.dtype)
    else:
        basis = jnp.linalg.qr(matrix)[0]
    inside = basis.T @ matrix
    # Eigenvectors of a small Gram are the inner matrix's left singular vectors, ascending.
    vectors = jnp.linalg.eigh(inside @ inside.T)[1][:, ::-1][:, :rank]
    left, right = (basis @ vectors).T, vectors.T @ inside
    missing = ((0, rank - left.shape[0]), (0, 0))
    return jnp.pad(left, missing), jnp.pad(right, missing)


def truncate_sum(
    u: Float[Array, "t o"], v: Float[Array, "t i"], rank: int
) -> tuple[Float[Array, "r o"], Float[Array, "r i"], Float[Array, ""], Float[Array, ""]]:
    """The best approximation of Σ_t u_t v_tᵀ by `rank` outer products, which is never formed.

    With uᵀ = Q_u R_u and vᵀ = Q_v R_v the sum is Q_u (R_u R_vᵀ) Q_vᵀ, so that its singular value
    decomposition follows from that of the matrix in the middle, which is as large as there are
    terms, or rows or columns where these are fewer.

    Args:
        u: Left vectors.
        v: Right vectors.
        rank: How many products to keep; more than the sum has are zeros.

    Returns:
        left: [rank, out], orthogonal, each as long as the root of its singular value.
        right: [rank, in], likewise; Σ_r left_r right_rᵀ is the approximation.
        square: The sum of squares of the whole sum.
        kept: That of the approximation.
    """
    q_u, r_u = jnp.linalg.qr(u.T)
    q_v, r_v = jnp.linalg.qr(v.T)
    left, values, right = jnp.linalg.svd(r_u @ r_v.T, full_matrices=False)
    squares = jnp.square(values)
    roots = jnp.sqrt(values[:rank])
    missing = ((0, rank - roots.shape[0]), (0, 0))
    return (
        jnp.pad((q_u @ left[:, :rank] * roots[None]).T, missing),
        jnp.pad((q_v @ right[:rank].T * roots[None]).T, missing),
        squares.sum(),
        squares[:rank].sum(),
    )
