"""Rows that are grouped by expert, against loops in numpy: routing, products, grids, a fold."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jhessians
from jhessians.capture.routing import collect, dispatch, grouped_product, over_grid, route
from jhessians.linalg.symmetric import unpack
from jhessians.models.moe import ExpertLinear
from tests import small
from tests.small import relative_error
from tests.tolerances import FACTORS, INVARIANCE

I, O = 7, 5  # noqa: E741


def choices(n, s, k, experts, seed=0):
    """Different experts for every token."""
    random = np.random.default_rng(seed)
    order = np.argsort(random.random((n, s, experts)), axis=-1)
    return order[..., :k].astype(np.int32)


@pytest.mark.parametrize(("n", "s", "k", "experts"), [(3, 5, 2, 4), (1, 1, 1, 1), (4, 9, 3, 20)])
def test_rows_are_sorted_by_expert_document_and_position(n, s, k, experts):
    chosen = choices(n, s, k, experts)
    routing = route(jnp.asarray(chosen), experts)
    expected = sorted(
        (int(chosen[d, t, j]), d, t, j) for d in range(n) for t in range(s) for j in range(k)
    )
    found = np.asarray(routing.choice)
    assert [((d * s + t) * k + j) for _, d, t, j in expected] == found.tolist()
    assert [d * s + t for _, d, t, _ in expected] == np.asarray(routing.token).tolist()
    np.testing.assert_array_equal(np.asarray(routing.row).reshape(-1)[found], np.arange(n * s * k))
    counts = [[(chosen[d] == e).sum() for d in range(n)] for e in range(experts)]
    np.testing.assert_array_equal(routing.counts, counts)
    np.testing.assert_array_equal(routing.sizes, np.sum(counts, axis=1))


def test_dispatch_and_collect_are_gathers_both_ways():
    chosen, d = choices(3, 4, 2, 5), 6
    routing = route(jnp.asarray(chosen), 5)
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.standard_normal((12, d)), jnp.float32)
    rows, weight = (jnp.asarray(random.standard_normal((24, d)), jnp.float32) for _ in range(2))

    np.testing.assert_array_equal(dispatch(tokens, routing), tokens[routing.token])
    found = jax.grad(lambda x: (dispatch(x, routing) * weight).sum())(tokens)
    expected = np.zeros((12, d))
    np.add.at(expected, np.asarray(routing.token), np.asarray(weight))
    assert relative_error(found, expected) < INVARIANCE

    # Every token's rows in the order of its choices, not of the experts' numbers.
    of_choice = np.empty((24, d), np.float32)
    of_choice[np.asarray(routing.choice)] = rows
    np.testing.assert_array_equal(collect(rows, routing), of_choice.reshape(12, 2, d))
    found = jax.grad(lambda x: (collect(x, routing) * weight.reshape(12, 2, d)).sum())(rows)
    np.testing.assert_array_equal(found, weight[routing.choice])


# Groups that are empty, at the start, in between and at the end; one group; one of all rows;
# sizes around a block of 16 and of 256 rows; more groups than rows.
SIZES = {
    "some": [5, 0, 3, 0, 0, 9, 0],
    "first and last": [0, 0, 31, 0],
    "one": [37],
    "blocks": [15, 16, 17, 32, 33],
    "large blocks": [513, 0, 700, 255],
    "many": [1, 0, 2, 0] * 12,
    "nothing": [0, 0],
}


def operands(sizes, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((sum(sizes), I)).astype(np.float32)
    kernels = random.standard_normal((len(sizes), I, O)).astype(np.float32)
    return x, kernels, np.array(sizes, np.int32)


def by_loop(x, kernels, sizes):
    ends = np.cumsum(sizes)
    parts = [
        x[end - size : end].astype(np.float64) @ kernel.astype(np.float64)
        for kernel, end, size in zip(kernels, ends, sizes, strict=True)
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", SIZES)
def test_a_grouped_product_and_its_gradients(name):
    x, kernels, sizes = operands(SIZES[name])
    weight = np.random.default_rng(2).standard_normal((len(x), O)).astype(np.float32)

    @jax.jit
    def both(x, kernels, sizes):
        y, pullback = jax.vjp(lambda x, k: grouped_product(x, k, sizes), x, kernels)
        return y, *pullback(jnp.asarray(weight))

    y, of_x, of_kernels = both(x, kernels, sizes)
    if not len(x):
        assert y.shape == (0, O) and not of_kernels.any()
        return
    assert relative_error(y, by_loop(x, kernels, sizes)) < INVARIANCE
    assert relative_error(of_x, by_loop(weight, kernels.swapaxes(1, 2), sizes)) < INVARIANCE

    def dense(kernels):  # every row with every kernel, of which one is its own
        group = jax.nn.one_hot(np.repeat(np.arange(len(sizes)), sizes), len(sizes))
        return jnp.einsum("re,ri,eio,ro->", group, x, kernels, weight)

    with jax.default_matmul_precision("highest"):
        assert relative_error(of_kernels, jax.grad(dense)(kernels)) < INVARIANCE
    assert not of_kernels[np.asarray(sizes) == 0].any()


def test_a_grouped_product_inside_a_scan():
    """Sizes that differ from step to step, in one compilation."""
    each = [[4, 0, 13], [0, 17, 0], [0, 0, 17], [6, 5, 6]]
    random = np.random.default_rng(0)
    x = random.standard_normal((17, I)).astype(np.float32)
    kernels = random.standard_normal((4, 3, I, O)).astype(np.float32)

    @jax.jit
    def run(x, kernels, sizes):
        def loss(x, kernels):
            step = lambda total, now: (total + jnp.square(grouped_product(x, *now)), None)  # noqa: E731
            return lax.scan(step, jnp.zeros((17, O)), (kernels, sizes))[0].sum()

        return jax.value_and_grad(loss, (0, 1))(x, kernels)

    value, (of_x, of_kernels) = run(x, kernels, np.array(each, np.int32))
    ys = [by_loop(x, k, sizes) for k, sizes in zip(kernels, each, strict=True)]
    assert float(value) == pytest.approx(sum((y**2).sum() for y in ys), rel=INVARIANCE)
    expected = sum(
        by_loop(2 * y, k.swapaxes(1, 2), sizes)
        for y, k, sizes in zip(ys, kernels, each, strict=True)
    )
    assert relative_error(of_x, expected) < INVARIANCE
    for step, (y, sizes) in enumerate(zip(ys, each, strict=True)):
        group = np.repeat(np.eye(3), sizes, axis=0)
        gradient = np.einsum("re,ri,ro->eio", group, x.astype(np.float64), 2 * y)
        assert relative_error(of_kernels[step], gradient) < INVARIANCE


def test_rows_of_other_groups_may_be_anything():
    """A block reaches into the next group's rows, whose infinities must stay there."""
    x, kernels, sizes = operands([3, 5, 20])
    x[3:8] = np.inf
    y = np.asarray(grouped_product(jnp.asarray(x), jnp.asarray(kernels), jnp.asarray(sizes)))
    assert np.isfinite(y[:3]).all() and np.isfinite(y[8:]).all()
    assert not np.isfinite(y[3:8]).all()


def grid_sums(chosen, experts, values):
    """By expert and document, the sum of the rows' values and how many there are; and the width."""
    n, s, k = chosen.shape
    routing = route(jnp.asarray(chosen), experts)
    rows = jnp.asarray(values.reshape(-1)[np.asarray(routing.token)])

    def compute(where, there):
        kept = jnp.where(there, rows[where], 0)
        return kept.sum(1), there.sum(1), jnp.int32(where.shape[1])

    @jax.jit
    def every():
        return lax.map(
            lambda e: over_grid(compute, routing, e, positions=s, axes=()), jnp.arange(experts)
        )

    return [np.asarray(x) for x in every()]


def all_to_one(n, s, experts):
    return np.full((n, s, 1), experts - 1, np.int32)


@pytest.mark.parametrize(
    ("chosen", "experts"),
    [
        (choices(3, 10, 2, 6), 6),
        (choices(2, 40, 1, 64), 64),  # most of them without a row
        (all_to_one(3, 50, 4), 4),
        (choices(200, 9, 2, 5), 5),
        (choices(1, 3, 4, 4), 4),  # every token to every expert
    ],
    ids=["some", "empty", "one", "documents", "all"],
)
def test_the_grid_shows_every_document_its_rows(chosen, experts):
    n, s, _ = chosen.shape
    values = np.random.default_rng(0).standard_normal((n, s)).astype(np.float32)
    sums, counts, width = grid_sums(chosen, experts, values)
    routed = np.stack([(chosen == e).any(-1) for e in range(experts)])
    expected = np.where(routed, values, 0).sum(-1, dtype=np.float64)
    assert relative_error(sums, expected) < INVARIANCE
    np.testing.assert_array_equal(counts, routed.sum(-1))
    # As wide as it must be, and no wider than twice that or the narrowest there is.
    most = routed.sum(-1).max(-1)
    assert ((width >= most) & (width <= s)).all()
    assert not width[most == 0].any()
    mean = max(8, chosen.size // (experts * n))
    assert (width[most > 0] <= np.maximum(2 * most, mean)[most > 0]).all()


class Mixture(nnx.Module):
    """A hand-written mixture without a stack: the token's number chooses."""

    def __init__(self, rngs, experts=3):
        self.inside = ExpertLinear(experts, I, O, use_bias=True, rngs=rngs)
        self.outside = ExpertLinear(experts, O, I, name="out.{expert}", rngs=rngs)

    def __call__(self, batch):
        x, chosen = batch
        routing = route(chosen, self.inside.kernel.shape[0])
        rows = dispatch(x.reshape(-1, x.shape[-1]), routing)
        rows = self.outside(jnp.tanh(self.inside(rows, routing)), routing)
        return collect(rows, routing).sum(1).reshape(x.shape)


def half_square(model, batch):
    return 0.5 * jnp.sum(model(batch) ** 2)


@dataclass(frozen=True)
class Diagonal:
    """A user's fold, which leaves it to the gradients to be zero where nothing counts."""

    def shapes(self, site):
        return jax.ShapeDtypeStruct((site.out_features, site.in_features), jnp.float32)

    def term(self, site, a, g, operands, context):
        return jnp.sum(jnp.einsum("nso,nsi->noi", g, a) ** 2, axis=0)


def rows_by_hand(model, batch):
    """Module -> documents' (a, g) in float64, the chain rule by hand."""
    x, chosen = batch
    w, v = (np.asarray(m.kernel[...], np.float64) for m in (model.inside, model.outside))
    b = np.asarray(model.inside.bias[...], np.float64)
    x = x.astype(np.float64)
    n, s, k = chosen.shape
    hidden = np.tanh(np.einsum("nsi,nskio->nsko", x, w[chosen]) + b[chosen])
    y = np.einsum("nsko,nskoi->nsi", hidden, v[chosen])
    g_in = np.einsum("nsi,nskoi->nsko", y, v[chosen]) * (1 - hidden**2)
    seen = {}
    for e in range(len(w)):
        # Of a document, its (position, choice) pairs that went to e.
        where = [np.nonzero(c == e) for c in chosen]
        seen[f"inside.{e}"] = [(x[d][t], g_in[d][t, j]) for d, (t, j) in enumerate(where)]
        seen[f"out.{e}"] = [(hidden[d][t, j], y[d][t]) for d, (t, j) in enumerate(where)]
    return seen


@pytest.mark.parametrize("devices", [1, 8])
def test_experts_of_a_hand_written_model(devices):
    """Names, sums over what is routed, and a fold of one's own that knows of no mask."""
    model = small.fill(lambda: Mixture(nnx.Rngs(0)))
    random = np.random.default_rng(0)
    batch = random.standard_normal((8, 6, I)).astype(np.float32), choices(8, 6, 2, 3)
    batch[1][:, :, 0][batch[1][:, :, 0] == 2] = 0  # an expert with few rows
    batch[1][:, :, 1] = (batch[1][:, :, 0] + 1) % 3
    mesh = jhessians.make_mesh(devices) if devices > 1 else None
    sites = jhessians.find_sites(half_square, model, batch)
    assert list(sites) == ["inside.{expert}", "out.{expert}"]
    assert sites["inside.{expert}"].module_names() == [f"inside.{e}" for e in range(3)]
    assert all(site.routed and site.owns_input for site in sites.values())

    seen = rows_by_hand(model, batch)
    problem = jhessians.Problem(half_square, model, sites, mesh=mesh)
    diagonal = jhessians.run_pass(Diagonal(), problem, [batch])
    sums = jhessians.run_pass(jhessians.Covariance(), problem, [batch])
    for name, site in sites.items():
        for slot, module in enumerate(site.module_names()):
            squares = sum((g.T @ a) ** 2 for a, g in seen[module])
            found = np.asarray(diagonal[name])[slot, : site.out_features]
            assert relative_error(found, squares) < FACTORS, module
            a, g = (np.concatenate(x) for x in zip(*seen[module], strict=True))
            for kind, rows in (("activation", a), ("gradient", g)):
                found = unpack([x[slot] for x in sums[name][kind]], rows.shape[1])
                assert relative_error(found, rows.T @ rows) < FACTORS, (module, kind)
            assert sums[name]["terms"][slot, :2].tolist() == [0, len(a)]
