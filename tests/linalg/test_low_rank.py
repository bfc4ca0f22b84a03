"""The approximation by outer products against numpy's truncated SVD."""

import jax.numpy as jnp
import numpy as np
import pytest

from jhessians.linalg.low_rank import truncate


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (12, 7)])
@pytest.mark.parametrize("rank", [1, 5, 60])
def test_keeps_what_the_truncated_svd_keeps(shape, rank):
    random = np.random.default_rng(0)
    small = min(shape)
    left, right = (np.linalg.qr(random.standard_normal((d, small)))[0] for d in shape)
    singular = 1 / np.arange(1, small + 1)
    matrix = (left * singular) @ right.T
    u, v = (np.asarray(x, np.float64) for x in truncate(jnp.asarray(matrix, jnp.float32), rank))
    assert u.shape == (rank, shape[0]) and v.shape == (rank, shape[1])
    best = np.square(singular[:rank]).sum()
    assert np.square(v).sum() == pytest.approx(best, rel=1e-3)
    # Orthonormal vectors on one side: what is lost is what the squares say.
    lost = np.square(matrix - u.T @ v).sum()
    assert lost == pytest.approx(np.square(singular).sum() - np.square(v).sum(), abs=1e-5)
