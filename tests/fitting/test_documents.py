"""Rows of single documents, counts, and whole statistics, against jax.grad and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from tests import small
from tests.small import relative_error
from tests.tolerances import FACTORS, INVARIANCE

LENGTHS = [9, 5, 2, 12, 7, 3, 8, 4]


class Wide(nnx.Module):
    """One linear wider than a packed block, [document, 600] -> [document, 3]."""

    def __init__(self, rngs):
        self.outer = nnx.Linear(600, 3, rngs=rngs)

    def __call__(self, x):
        return self.outer(x)


def squares(model, batch):
    return 0.5 * jnp.sum((model(batch["x"]) - batch["y"]) ** 2)


def wide_batch(documents=16):
    random = np.random.default_rng(0)
    x = random.standard_normal((documents, 600)).astype(np.float32)
    return {"x": x, "y": random.standard_normal((documents, 3)).astype(np.float32)}


@pytest.mark.parametrize("devices", [1, 8])
def test_unpack_gives_whole_factors_inside_jit(devices):
    model, batch = Wide(nnx.Rngs(0)), wide_batch()
    mesh = jhessians.make_mesh(devices) if devices > 1 else None
    sites = jhessians.find_sites(squares, model, batch)
    problem = jhessians.Problem(squares, model, sites, mesh=mesh)
    graph, state = nnx.split(model)
    fold = jhessians.Covariance()

    @jax.jit
    def factors(state, batch):
        here = problem.of(nnx.merge(graph, state))
        sums, _ = jhessians.accumulate(fold, here, batch, jhessians.initialize(fold, here))
        return jhessians.unpack(fold, here, sums)

    found = factors(state, batch)["outer"]
    x = batch["x"].astype(np.float64)
    w, b = (np.asarray(v[...], np.float64) for v in (model.outer.kernel, model.outer.bias))
    g = x @ w + b - batch["y"]
    assert relative_error(found["activation"], x.T @ x) < FACTORS
    assert relative_error(found["gradient"], g.T @ g) < FACTORS
    np.testing.assert_array_equal(found["activation"], found["activation"].T)


@pytest.mark.parametrize(
    "fold",
    [
        jhessians.Shampoo(),
        jhessians.EigenvalueCorrection(),
        jhessians.SecondMoment(),
        jhessians.TKFAC(),
    ],
)
def test_unpack_cuts_what_the_mesh_pads(fold):
    model, data = small.decoder(layers=2), small.documents(LENGTHS)
    loss = jhessians.NextTokenLoss("dataset")
    results = []
    for devices in (1, 7):
        batches = small.batches(data, devices=devices)
        sites = jhessians.find_sites(loss, model, batches[0])
        mesh = jhessians.make_mesh(devices) if devices > 1 else None
        problem = jhessians.Problem(loss, model, sites, mesh=mesh)
        operands = None
        if isinstance(fold, jhessians.EigenvalueCorrection):
            operands = {
                name: {
                    side: jnp.broadcast_to(jnp.eye(d + -d % devices, d), (2, d + -d % devices, d))
                    for side, d in (("activation", s.inputs), ("gradient", s.out_features))
                }
                for name, s in sites.items()
            }
        sums = jhessians.run_pass(fold, problem, batches, operands=operands)
        results.append(jhessians.unpack(fold, problem, sums))
    one, seven = results
    assert list(one) == list(seven) and "layers.1.mlp.up" in one
    for name in one:
        for a, b in zip(jax.tree.leaves(one[name]), jax.tree.leaves(seven[name]), strict=True):
            assert relative_error(b, a) < 10 * INVARIANCE, name


def test_statistics_of_another_fold_are_refused():
    model, batch = Wide(nnx.Rngs(0)), wide_batch()
    problem = jhessians.Problem(squares, model, jhessians.find_sites(squares, model, batch))
    sums = jhessians.run_pass(jhessians.Covariance(), problem, [batch])
    with pytest.raises(jhessians.FoldError, match="outer are not what the fold keeps"):
        jhessians.unpack(jhessians.SecondMoment(), problem, sums)


@pytest.fixture(scope="module")
def decoder():
    model, data = small.decoder(layers=2), small.documents(LENGTHS)
    return model, data, jhessians.NextTokenLoss("dataset")


def rows(decoder, fold, *, devices=1, **plan):
    model, data, loss = decoder
    batches = small.batches(data, devices=devices, **plan)
    sites = jhessians.find_sites(loss, model, batches[0], include_bias=True)
    mesh = jhessians.make_mesh(devices) if devices > 1 else None
    return jhessians.map_documents(fold, jhessians.Problem(loss, model, sites, mesh=mesh), batches)


def test_gradients_of_documents_are_those_of_jax_grad(decoder):
    model, data, loss = decoder
    found = rows(decoder, jhessians.DocumentGradients())
    graph, state = nnx.split(model)
    name, path = "layers.1.mlp.up", ("layers", "blocks", "mlp", "up")
    gradients = jax.jit(jax.grad(lambda state, batch: loss(nnx.merge(graph, state), batch)))
    for index in (0, 2, 3):  # also the shortest and the longest, without padding
        (batch,) = small.batches(small_documents(data, index))
        gradient = gradients(state, jax.tree.map(jnp.asarray, batch))
        for step in path:
            gradient = gradient[step]
        kernel, bias = gradient["kernel"][...][1].T, gradient["bias"][...][1]
        expected = np.concatenate([kernel, bias[:, None]], axis=1)
        assert relative_error(found[name][index], expected) < FACTORS, index


def small_documents(data, index):
    tokens, _ = data.document(index)
    return type(data)(tokens, None, np.array([0, len(tokens)]))


@pytest.mark.parametrize("devices, plan", [(7, {}), (8, {"token_batch_size": 16, "max_shapes": 3})])
def test_rows_come_in_the_datas_order_whatever_the_batches(decoder, devices, plan):
    expected = rows(decoder, jhessians.DocumentSquaredNorms())
    found = rows(decoder, jhessians.DocumentSquaredNorms(), devices=devices, **plan)
    gradients = rows(decoder, jhessians.DocumentGradients())
    for name, squares_ in expected.items():
        assert squares_.shape == (len(LENGTHS),)
        assert relative_error(found[name], squares_) < INVARIANCE, name
        exact = np.square(gradients[name].astype(np.float64)).sum((1, 2))
        assert relative_error(squares_, exact) < FACTORS, name
    # A wrong twin: in another order they are something else.
    assert relative_error(expected["layers.0.mlp.up"][::-1], expected["layers.0.mlp.up"]) > 0.1


def test_several_draws_are_refused(decoder):
    model, data, _ = decoder
    loss = jhessians.NextTokenLoss(draws=2)
    batches = small.batches(data)
    problem = jhessians.Problem(loss, model, jhessians.find_sites(loss, model, batches[0]), draws=2)
    with pytest.raises(ValueError, match="2 draws would be added up"):
        jhessians.map_documents(jhessians.DocumentGradients(), problem, batches)


def test_fit_counts_for_itself(decoder):
    model, data, loss = decoder
    batches = small.batches(data)
    problem = jhessians.Problem(loss, model, jhessians.find_sites(loss, model, batches[0]))
    counted = jhessians.fit(problem, batches)
    told = jhessians.fit(problem, batches, positions=data.positions, documents=len(data))
    for kind, modules in told.items():
        for name, value in modules.items():
            np.testing.assert_array_equal(counted[kind][name], value)


def test_fit_counts_what_linears_read_where_there_is_no_mask():
    model, batch = Wide(nnx.Rngs(0)), wide_batch()
    problem = jhessians.Problem(squares, model, jhessians.find_sites(squares, model, batch))
    found = jhessians.fit(problem, [batch, batch], correct_eigenvalues=False)
    x = batch["x"].astype(np.float64)
    values = np.linalg.eigvalsh(x.T @ x / len(x))
    # λ_A · √(n / N), and here every document is one position.
    assert relative_error(found["activation_eigenvalues"]["outer"], values) < FACTORS


def test_a_dicts_mask_is_honoured():
    model, batch = Wide(nnx.Rngs(0)), wide_batch()
    mask = np.arange(16)[:, None] < 10
    masked = batch | {"position_mask": mask}
    sites = jhessians.find_sites(squares, model, batch)
    problem = jhessians.Problem(squares, model, sites)
    found = jhessians.fit(problem, [masked], correct_eigenvalues=False)
    x = batch["x"][:10].astype(np.float64)
    assert relative_error(found["activation_covariance"]["outer"], x.T @ x) < FACTORS


def test_a_pass_inside_a_callers_jit_says_what_to_use():
    model, batch = Wide(nnx.Rngs(0)), wide_batch()
    problem = jhessians.Problem(squares, model, jhessians.find_sites(squares, model, batch))
    calls = {
        "run_pass": lambda b: jhessians.run_pass(jhessians.Covariance(), problem, [b]),
        "fit": lambda b: jhessians.fit(problem, [b]),
        "map": lambda b: jhessians.map_documents(jhessians.DocumentGradients(), problem, [b]),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match="call initialize, accumulate and unpack instead"):
            jax.jit(call)(batch)
            pytest.fail(name)
