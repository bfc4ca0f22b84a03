"""To what a chip's share of a sum is padded: pieces of whole tiles at every axis, little more."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.capture import traversal
from jhessians.devices.tiles import LANES, LARGEST_PIECE, padded_share
from tests import small
from tests.small import relative_error

# Rows and columns of a chip's share, and the mesh: of 8B and 70B models on 16 to 256 chips.
SHARES = [
    ((86, 4096), (4, 4)), ((86, 1366), (4, 4)), ((299, 9558), (4, 4)), ((22, 342), (4, 4)),
    ((150, 28672), (4, 4, 4)), ((43, 8192), (4, 4, 4)), ((38, 19115), (4, 4, 4, 4)),
    ((6, 1365), (4, 4, 4, 4)), ((1195, 28672), (2, 2, 2)), ((100, 900), (3, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("share", "sizes"), SHARES)
def test_shares_divide_into_pieces_of_whole_tiles(share, sizes):
    rows, columns = padded_share(share, sizes)
    assert rows >= share[0] and columns >= share[1]
    assert rows * columns < 1.6 * math.prod(share)
    tiles = -(-rows // 8) * -(-columns // LANES)  # of float32
    for i in range(len(sizes)):
        together = tiles * math.prod(sizes[i + 1 :])
        powers = [2**k for k in range(1, 30) if together % 2**k == 0]
        assert any(together // power <= LARGEST_PIECE for power in powers)


def test_small_ones_and_those_that_fit_are_left_alone():
    assert padded_share((86, 4096), (4, 4)) == (86, 4096)
    assert padded_share((2, 233), (4, 4, 4, 4)) == (2, 233)


class One(nnx.Module):
    def __init__(self, rngs):
        self.linear = jhessians.Linear(1365, 700, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def test_sums_are_the_same_with_padding(monkeypatch):
    """As if the CPU's devices were TPUs: a device's 30 rows are filled up to 32."""
    model = small.fill(lambda: One(nnx.Rngs(0)))
    batch = np.random.default_rng(0).standard_normal((8, 3, 1365)).astype(np.float32)

    def loss(model, x):
        return 0.5 * jnp.sum(model(x) ** 2)

    sites = jhessians.find_sites(loss, model, batch)

    def sums(mesh):
        fold = jhessians.Covariance()
        problem = jhessians.Problem(loss, model, sites, mesh=mesh)
        found = jhessians.unpack(fold, problem, jhessians.run_pass(fold, problem, [batch]))
        return {name: np.asarray(x) for name, x in found["linear"].items()}

    expected = sums(None)
    monkeypatch.setattr(traversal, "platform_of", lambda mesh: "tpu")
    calls = []
    filled_share = jhessians.Context.filled_share
    monkeypatch.setattr(
        jhessians.Context, "filled_share",
        lambda self, *given: calls.append(filled_share(self, *given)) or calls[-1],
    )  # fmt: skip
    found = sums(jhessians.make_mesh(8, axes="4x2"))
    assert (32, 700) in calls
    for name, x in expected.items():
        assert relative_error(found[name], x) < 1e-6
