"""Factors as an object: applied to a Flax module's gradients, in jit, by optax, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jhessians
from jhessians.cli.main import main
from jhessians.errors import CheckpointError
from tests.influence.case import damped, inverse
from tests.oracles import checkpoints
from tests.small import relative_error
from tests.tolerances import SCORES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint with biases, and its EKFAC run."""
    folder = tmp_path_factory.mktemp("factors")
    model = checkpoints.build("gpt_neox", folder / "model", seed=1)
    data = checkpoints.corpus(model, 12)
    words = ["compute", str(folder / "run"), "--model", str(model), "--dataset", str(data),
             "--truncation", "--token_batch_size", "128", "--include_bias", "--quiet"]  # fmt: skip
    assert main(words) == 0
    return folder


@pytest.fixture(scope="module")
def model(run):
    import converters

    return converters.load(str(run / "model")).model


def gradient_of(model, seed=0):
    """Anything of the parameters' form."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), nnx.state(model)
    )


def of_module(state, layer):
    """The gradient [out, in + 1] of a layer's fused attention linear."""
    linear = state["layers"]["blocks"]["attention"]["query_key_value"]
    kernel, bias = (np.asarray(linear[name][...][layer], np.float64) for name in ("kernel", "bias"))
    return np.concatenate([kernel.T, bias[:, None]], 1)


@pytest.mark.parametrize("devices", [1, 8])
def test_applied_to_the_modules_own_gradients(run, model, devices):
    mesh = jhessians.make_mesh(devices) if devices > 1 else None
    factors = jhessians.load_factors(run / "run", model=model, mesh=mesh)
    gradient = gradient_of(model)
    applied = jax.jit(lambda f, g: f.apply(g, damping_factor=0.1))(factors, gradient)
    assert jax.tree.structure(applied) == jax.tree.structure(gradient)
    whole = {kind: {k: np.asarray(v) for k, v in factors[kind].items()} for kind in factors}
    for layer in range(2):
        name = f"layers.{layer}.attention.query_key_value"
        expected = inverse(whole, name, damped(0.1))(of_module(gradient, layer))
        assert relative_error(of_module(applied, layer), expected) < SCORES
        by_name = factors.damping(0.1).apply({name: jnp.asarray(of_module(gradient, layer))})
        assert relative_error(by_name[name], expected) < SCORES
    assert not np.asarray(applied["embedding"][...]).any()
    pure = factors.apply(nnx.to_pure_dict(gradient), damping_factor=0.1, others="keep")
    np.testing.assert_array_equal(pure["embedding"], gradient["embedding"][...])


def test_log_determinant_and_samples(run, model):
    factors = jhessians.load_factors(run / "run", model=model).damping(0.3)
    name = "layers.1.mlp.dense_h_to_4h"
    values = {k: v.astype(np.float64) for k, v in factors["eigenvalue_correction"].items()}
    expected = sum(np.log(v + 0.3 * v.mean()).sum() for v in values.values())
    assert float(factors.log_determinant()) == pytest.approx(expected, rel=1e-5)

    keys = jax.random.split(jax.random.key(0), 4000)
    only = jhessians.Factors({k: {name: factors[k][name]} for k in factors}, factors.inverse)
    samples = np.asarray(jax.vmap(lambda key: only.sample(key, documents=5)[name])(keys))
    q_s, q_a = (factors[f"{side}_eigenvectors"][name] for side in ("gradient", "activation"))
    variances = np.square(q_s.T @ samples @ q_a).mean(0)
    precision = 5 * (values[name] + 0.3 * values[name].mean())
    assert np.abs(variances * precision - 1).max() < 0.15  # 4000 draws: 2.2 % a standard deviation
    of_model = factors.sample(keys[0], like=nnx.state(model))
    assert not np.asarray(of_model["embedding"][...]).any() and of_module(of_model, 0).any()


def test_preconditions_an_optimizer(run, model):
    factors = jhessians.load_factors(run / "run", model=model)
    chain = optax.chain(jhessians.precondition_by_factors(factors, 0.1), optax.sgd(0.5))
    gradient = gradient_of(model)
    updates, _ = chain.update(gradient, chain.init(nnx.state(model)))
    applied = factors.apply(gradient, damping_factor=0.1)
    assert relative_error(of_module(updates, 0), -0.5 * of_module(applied, 0)) < 1e-6
    np.testing.assert_allclose(updates["embedding"][...], -0.5 * gradient["embedding"][...])


def test_what_does_not_fit_is_refused(run, model):
    factors = jhessians.load_factors(run / "run")
    with pytest.raises(ValueError, match="load them with it, load_factors"):
        factors.apply(gradient_of(model))
    name = factors.modules[0]
    with pytest.raises(CheckpointError, match=r"has shape \[3, 2\]; its factors are for"):
        factors.apply({name: jnp.ones((3, 2))})
    with pytest.raises(CheckpointError, match="the model has no linear"):
        jhessians.load_factors(run / "run", model=nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
