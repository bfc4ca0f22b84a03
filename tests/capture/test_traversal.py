"""What the traversal shows a fold, on hand-written models whose gradients are written out here."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.capture.sites import restrict
from jhessians.capture.traversal import row_shardings
from jhessians.linalg.symmetric import unpack
from tests import small
from tests.oracles import kfac_numpy
from tests.small import relative_error
from tests.tolerances import INVARIANCE

I, H, O = 6, 9, 5  # noqa: E741


class MLP(nnx.Module):
    """Two linears that read the same array, added, and one behind them."""

    def __init__(self, rngs):
        self.left = jhessians.Linear(I, H, rngs=rngs)
        self.right = jhessians.Linear(I, H, use_bias=False, rngs=rngs)
        self.out = jhessians.Linear(H, O, name="head", rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.left(x) + self.right(x)))


def squares(model, batch):
    x, y = batch
    return 0.5 * jnp.sum((model(x) - y) ** 2)


def make(n=8, s=4, seed=0):
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((n, s, I)), random.standard_normal((n, s, O))
    mask = random.random((n, s)) < 0.7
    model = small.fill(lambda: MLP(nnx.Rngs(0)))
    return model, (x.astype(np.float32), y.astype(np.float32)), mask


def what_linears_see(model, batch):
    """Name -> (a, g) in float64, the chain rule by hand."""
    x, y = (v.astype(np.float64) for v in batch)
    left, right, out = (np.asarray(m.kernel[...], np.float64) for m in
                        (model.left, model.right, model.out))  # fmt: skip
    hidden = np.tanh(x @ left + np.asarray(model.left.bias[...], np.float64) + x @ right)
    g_out = hidden @ out + np.asarray(model.out.bias[...], np.float64) - y
    g_in = (g_out @ out.T) * (1 - hidden**2)
    return {"left": (x, g_in), "right": (x, g_in), "head": (hidden, g_out)}


def covariances(model, batch, mask=None):
    """Name -> (A, S) in float64."""
    result = {}
    for name, (a, g) in what_linears_see(model, batch).items():
        masks = np.ones(a.shape[:2], bool) if mask is None else mask
        result[name] = kfac_numpy.covariances(list(zip(a, g, strict=True)), list(masks))[:2]
    return result


def compare(statistics, sites, expected, tolerance=INVARIANCE):
    for name, site in sites.items():
        a = statistics[site.input_site]["activation"]
        assert relative_error(unpack(a, site.inputs), expected[name][0]) < tolerance
        s = statistics[name]["gradient"]
        assert relative_error(unpack(s, site.out_features), expected[name][1]) < tolerance


def problem_of(model, batch, mask=None, mesh=None, loss=None):
    loss = loss or squares
    sites = jhessians.find_sites(loss, model, batch)
    return jhessians.Problem(loss, model, sites, mask=lambda batch: mask, mesh=mesh)


def accumulated(problem, batch, fold=None, times=1):
    """The statistics and the last loss of one batch, added up some times."""
    fold = fold or jhessians.Covariance()
    statistics = jhessians.initialize(fold, problem)
    for _ in range(times):
        statistics, value = jhessians.accumulate(fold, problem, batch, statistics)
    return statistics, value


def test_sites_of_a_hand_written_model():
    model, batch, _ = make()
    sites = jhessians.find_sites(squares, model, batch)
    assert list(sites) == ["left", "right", "head"]
    assert [s.input_site for s in sites.values()] == ["left", "left", "head"]
    assert [(s.in_features, s.out_features) for s in sites.values()] == [(I, H), (I, H), (H, O)]
    assert [s.use_bias for s in sites.values()] == [True, False, True]
    assert not any(s.ones or s.members for s in sites.values())
    assert [s.module_names() for s in sites.values()] == [["left"], ["right"], ["head"]]
    assert model.left.tape is None and model.left.name is None  # nothing stays on the model

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    abstract = nnx.eval_shape(lambda: MLP(nnx.Rngs(0)))
    assert jhessians.find_sites(squares, abstract, shapes) == sites


def test_biases_separate_inputs_and_selection_hands_them_on():
    model, batch, _ = make()
    sites = jhessians.find_sites(squares, model, batch, include_bias=True)
    assert [s.ones for s in sites.values()] == [True, False, True]
    assert [s.inputs for s in sites.values()] == [I + 1, I, H + 1]
    assert sites["right"].input_site == "right"  # left's A has one row more
    only = jhessians.find_sites(squares, model, batch, select=lambda name: name == "right")
    assert list(only) == ["right"] and only["right"].owns_input


def test_sites_of_a_decoder():
    model = small.decoder(**small.LLAMA, layers=3)
    (batch,) = small.batches(small.documents([5, 7]))
    loss = jhessians.NextTokenLoss("dataset")
    sites = jhessians.find_sites(loss, model, batch)
    names = [f"attention.{name}" for name in ("query", "key", "value", "output")]
    names += [f"mlp.{name}" for name in ("gate", "up", "down")]
    assert list(sites) == [f"layers.{{layer}}.{name}" for name in names]
    owners = [s.input_site.removeprefix("layers.{layer}.") for s in sites.values()]
    assert owners == [names[0]] * 3 + ["attention.output"] + ["mlp.gate"] * 2 + ["mlp.down"]
    down = sites["layers.{layer}.mlp.down"]
    assert down.module_names() == [f"layers.{i}.mlp.down" for i in range(3)]
    assert (down.members, down.stack) == ((0, 1, 2), (("layer", 3),))

    some = restrict(sites, lambda name: name != "layers.1.attention.query" and "mlp" not in name)
    assert some["layers.{layer}.attention.query"].members == (0, 2)
    # Query and key are no longer of the same layers, so key keeps its own input, for value too.
    owners = [s.input_site.removeprefix("layers.{layer}.") for s in some.values()]
    assert owners == ["attention.query", "attention.key", "attention.key", "attention.output"]


@pytest.mark.parametrize("with_mask", [False, True])
def test_covariances_of_a_hand_written_model(with_mask):
    model, batch, mask = make()
    mask = mask if with_mask else None
    problem = problem_of(model, batch, mask)
    statistics, value = accumulated(problem, batch, times=2)
    x, y = what_linears_see(model, batch)["head"]
    assert float(value) == pytest.approx(0.5 * (y**2).sum(), rel=1e-6)
    expected = covariances(model, batch, mask)
    twice = {name: (2 * a, 2 * s) for name, (a, s) in expected.items()}
    compare(statistics, problem.sites, twice)
    assert "activation" not in statistics["right"]


@dataclass(frozen=True)
class Diagonal:
    """A user's fold: squares of the documents' gradients."""

    def shapes(self, site):
        return jax.ShapeDtypeStruct((site.out_features, site.in_features), jnp.float32)

    def term(self, site, a, g, operands, context):
        return jnp.sum(jnp.einsum("nso,nsi->noi", g, a) ** 2, axis=0)


@pytest.mark.parametrize("shape", [None, (8,), (2, 4), (3, 2), (7,)])
def test_a_fold_of_ones_own_in_ones_own_jit_and_mesh(shape):
    count = int(np.prod(shape)) if shape else 1
    model, batch, _ = make(n=2 * count)
    mesh = None
    if shape:
        names = ("rows", "columns")[: len(shape)]
        mesh = jax.make_mesh(shape, names, devices=jax.devices()[:count])
    problem = problem_of(model, batch, mesh=mesh)
    graph, state = nnx.split(model)

    @jax.jit
    def mean_square_gradients(state, batch):
        statistics, _ = accumulated(problem.of(nnx.merge(graph, state)), batch, Diagonal())
        return jax.tree.map(lambda x: x / len(batch[0]), statistics)

    result = mean_square_gradients(state, batch)
    for name, (a, g) in what_linears_see(model, batch).items():
        expected = np.square(np.einsum("nso,nsi->noi", g, a)).mean(0)
        found = np.asarray(result[name])
        assert len(found) % count == 0 and not found[len(expected) :].any()
        assert relative_error(found[: len(expected)], expected) < INVARIANCE
        if mesh:
            assert not result[name].sharding.is_fully_replicated


class Twice(nnx.Module):
    """One linear called twice, so that its weight is shared, and one that reads its first input."""

    def __init__(self, rngs):
        self.linear = jhessians.Linear(I, I, use_bias=False, rngs=rngs)
        self.other = jhessians.Linear(I, I, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.linear(jnp.tanh(self.linear(x))) + self.other(x)


def test_a_linear_that_is_called_twice_sums_both_calls():
    model, (x, _), mask = make()
    model, batch = small.fill(lambda: Twice(nnx.Rngs(0))), (x, np.roll(x, 1))
    problem = problem_of(model, batch, mask)
    assert [s.input_site for s in problem.sites.values()] == ["linear", "other"]
    statistics, _ = accumulated(problem, batch)

    w = np.asarray(model.linear.kernel[...], np.float64)
    a, y = (v.astype(np.float64) for v in batch)
    hidden = np.tanh(a @ w)
    g_out = hidden @ w + a @ np.asarray(model.other.kernel[...], np.float64) - y
    g_in = (g_out @ w.T) * (1 - hidden**2)
    calls = [(a, g_in), (hidden, g_out), (a, g_out)]
    one, two, other = (
        kfac_numpy.covariances(list(zip(*call, strict=True)), list(mask))[:2] for call in calls
    )
    summed = {"linear": (one[0] + two[0], one[1] + two[1]), "other": other}
    compare(statistics, problem.sites, summed)


def test_documents_may_have_no_position_axis_or_two():
    model, (x, y), _ = make(n=4, s=6)
    expected = covariances(model, (x, y))
    for shape in ((24,), (4, 2, 3)):
        batch = x.reshape(*shape, I), y.reshape(*shape, O)
        problem = problem_of(model, batch)
        compare(accumulated(problem, batch)[0], problem.sites, expected)


def test_some_layers_give_the_numbers_that_all_give():
    model = small.decoder(layers=3)
    (batch,) = data = small.batches(small.documents([5, 7, 9]))
    loss = jhessians.NextTokenLoss("dataset")
    everything = jhessians.find_sites(loss, model, batch)
    kept = ("layers.0.", "layers.2.mlp", "layers.1.mlp.down")
    some = restrict(everything, lambda name: name.startswith(kept))
    assert {s.members for s in some.values()} == {(0,), (0, 2), (0, 1, 2)}
    all_of_it, part = (
        jhessians.run_pass(jhessians.Covariance(), jhessians.Problem(loss, model, sites), data)
        for sites in (everything, some)
    )
    for name, site in some.items():
        for kind in ("activation", "gradient"):
            for one, other in zip(part[name][kind], all_of_it[name][kind], strict=True):
                assert relative_error(one, other[np.array(site.members)]) < INVARIANCE


def test_uneven_rows_lie_where_they_are_said_to():
    mesh = jhessians.make_mesh(7)
    model, batch, _ = make()
    problem = problem_of(model, batch, mesh=mesh)
    statistics = jhessians.initialize(jhessians.Covariance(), problem)
    for leaf, sharding in zip(
        jax.tree.leaves(statistics),
        jax.tree.leaves(row_shardings(problem.sites, statistics, mesh)),
        strict=True,
    ):
        assert leaf.sharding == sharding
        assert {shard.data.shape[0] * 7 for shard in leaf.addressable_shards} == {leaf.shape[0]}


def test_a_loss_that_is_no_single_number_is_refused():
    model, batch, _ = make()

    def by_document(model, batch):
        return jnp.sum((model(batch[0]) - batch[1]) ** 2, axis=(1, 2))

    with pytest.raises(ValueError, match="expected 1 losses"):
        accumulated(problem_of(model, batch, loss=by_document), batch)


def test_sites_can_be_changed_by_hand():
    model, batch, _ = make()
    sites = jhessians.find_sites(squares, model, batch)
    own = {name: replace(site, input_site=name) for name, site in sites.items()}
    statistics, _ = accumulated(jhessians.Problem(squares, model, own), batch)
    compare(statistics, own, covariances(model, batch))
