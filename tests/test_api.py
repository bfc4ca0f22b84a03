"""jhessians as a research script uses it: functions of pytrees, and the scripts in `examples/`."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.errors import NumericsError
from tests import small
from tests.oracles import kfac_numpy
from tests.small import relative_error
from tests.tolerances import DAMPED_INVERSE, FACTORS, INVARIANCE

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def setting():
    model = small.decoder(layers=1)
    data = small.documents([9, 5, 2, 7, 1, 8])
    batches = small.batches(data)
    loss = jhessians.NextTokenLoss(labels="dataset")
    sites = jhessians.find_sites(loss, model, batches[0], include_bias=True)
    problem = jhessians.Problem(loss, model, sites)
    factors = jhessians.fit(problem, batches, positions=data.positions, documents=len(data))
    return SimpleNamespace(**locals())


def test_every_exported_name_exists():
    assert set(jhessians.__all__) <= set(dir(jhessians))
    for name in jhessians.__all__:
        assert getattr(jhessians, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        jhessians.fitt  # noqa: B018


def test_fit_returns_every_kind_for_every_module(setting):
    names = ["attention.query_key_value", "attention.output", "mlp.up", "mlp.down"]
    shapes = {"attention.query_key_value": (48, 17), "attention.output": (16, 17),
              "mlp.up": (24, 17), "mlp.down": (16, 25)}  # fmt: skip
    for kind, modules in setting.factors.items():
        assert list(modules) == [f"layers.0.{name}" for name in names]
        for name in names:
            o, i = shapes[name]
            expected = {
                "activation_covariance": (i, i), "gradient_covariance": (o, o),
                "activation_eigenvectors": (i, i), "gradient_eigenvectors": (o, o),
                "activation_eigenvalues": (i,), "gradient_eigenvalues": (o,),
                "eigenvalue": (o, i), "eigenvalue_correction": (o, i),
            }[kind]  # fmt: skip
            value = modules[f"layers.0.{name}"]
            assert isinstance(value, np.ndarray) and value.dtype == np.float32
            assert value.shape == expected
    assert len(setting.factors) == 8


def test_the_kinds_fit_together(setting):
    factors, data = setting.factors, setting.data
    for name in factors["eigenvalue"]:
        values = {}
        for side in ("activation", "gradient"):
            covariance = factors[f"{side}_covariance"][name].astype(np.float64)
            vectors = factors[f"{side}_eigenvectors"][name].astype(np.float64)
            values[side] = kfac_numpy.eigendecomposition(covariance, data.positions)[0]
            rebuilt = (vectors * values[side]) @ vectors.T * data.positions
            assert relative_error(rebuilt, covariance) < FACTORS
            own = kfac_numpy.factor_eigenvalues(values[side], data.positions, len(data))
            assert relative_error(factors[f"{side}_eigenvalues"][name], own) < FACTORS
        outer = kfac_numpy.kronecker_eigenvalues(
            values["gradient"], values["activation"], data.positions, len(data)
        )
        assert relative_error(factors["eigenvalue"][name], outer) < FACTORS


def test_an_inverse_from_the_factors(setting):
    factors = setting.factors
    name = "layers.0.mlp.up"
    kinds = {"gradient_eigenvectors": "gradient_eigenvectors",
             "activation_eigenvectors": "activation_eigenvectors",
             "eigenvalues": "eigenvalue_correction"}  # fmt: skip
    parts = {argument: factors[kind][name] for argument, kind in kinds.items()}
    gradients = np.random.default_rng(0).standard_normal((3, 24, 17))
    result = jax.jit(jhessians.inverse_vector_product)(
        jnp.asarray(gradients, jnp.float32), **jax.tree.map(jnp.asarray, parts)
    )
    wide = [part.astype(np.float64) for part in parts.values()]
    expected = kfac_numpy.apply_damped_inverse(gradients, *wide, damping_factor=0.1)
    assert relative_error(result, expected) < DAMPED_INVERSE


def test_accumulate_in_ones_own_loop_equals_run_pass(setting):
    fold = jhessians.EigenvalueCorrection()
    random = np.random.default_rng(0)

    def basis(d):
        return jnp.asarray(np.linalg.qr(random.standard_normal((1, d, d)))[0], jnp.float32)

    operands = {
        name: {"activation": basis(site.inputs), "gradient": basis(site.out_features)}
        for name, site in setting.sites.items()
    }
    by_pass = jhessians.run_pass(fold, setting.problem, setting.batches, operands=operands)

    graph, state = nnx.split(setting.model)

    @jax.jit
    def step(state, batch, statistics, operands):
        problem = setting.problem.of(nnx.merge(graph, state))
        return jhessians.accumulate(fold, problem, batch, statistics, operands=operands)

    statistics = jhessians.initialize(fold, setting.problem)
    for batch in setting.batches:
        statistics, loss = step(state, batch, statistics, operands)
        assert loss.shape == () and np.isfinite(loss)
    for one, other in zip(jax.tree.leaves(statistics), jax.tree.leaves(by_pass), strict=True):
        assert relative_error(one, other) < INVARIANCE


def test_kfac_alone_makes_one_pass(setting):
    seen = []

    class Batches(list):
        def __iter__(self):
            seen.append("pass")
            return super().__iter__()

    factors = jhessians.fit(
        setting.problem, Batches(setting.batches), positions=setting.data.positions,
        documents=len(setting.data), correct_eigenvalues=False,
    )  # fmt: skip
    assert seen == ["pass"]
    assert set(setting.factors) - set(factors) == {"eigenvalue_correction"}
    name = "layers.0.mlp.down"
    np.testing.assert_array_equal(
        factors["gradient_covariance"][name], setting.factors["gradient_covariance"][name]
    )


def test_an_iterator_is_refused_before_it_is_used_up(setting):
    with pytest.raises(TypeError, match="batches is an iterator; expected something to iterate tw"):
        jhessians.fit(setting.problem, iter(setting.batches), positions=1, documents=1)


def test_a_loss_that_is_not_finite_is_reported_with_its_batch(setting):
    def loss(model, batch):
        return setting.loss(model, batch) + jnp.where(batch.tokens[0, 0] < 0, jnp.nan, 0.0)

    bad = setting.batches[0]._replace(tokens=setting.batches[0].tokens - 100)
    problem = jhessians.Problem(loss, setting.model, setting.sites)
    with pytest.raises(NumericsError, match="the loss of batch 2 is nan; expected a finite"):
        jhessians.run_pass(jhessians.Covariance(), problem, [setting.batches[0], bad])


def test_a_covariance_that_is_not_finite_is_named():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = jhessians.Linear(3, 4, name="first", rngs=rngs)
            self.second = jhessians.Linear(4, 2, name="second", rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    model = small.fill(lambda: Model(nnx.Rngs(0)))
    model.first.bias[...] = jnp.zeros(4)
    model.second.kernel[...] = jnp.full((4, 2), 1e20)
    x = np.zeros((2, 1, 3), np.float32)

    def loss(model, batch):
        return jnp.sum(model(batch))  # itself finite, unlike the squares of its gradients

    sites = jhessians.find_sites(loss, model, x)
    problem = jhessians.Problem(loss, model, sites)
    with pytest.raises(NumericsError, match="the gradient covariance of first holds NaN or inf"):
        jhessians.fit(problem, [x], positions=2, documents=2)


def run_example(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_own_fold(capsys):
    heading, *rows = run_example("own_fold.py", capsys)
    assert "256 documents" in heading
    assert len(rows) == 7  # q, k, v, o, gate, up, down
    for row in rows:
        name, *values = row.split()
        assert re.fullmatch(r"layers\.\{layer\}\.(self_attn|mlp)\.\w+_proj", name)
        assert len(values) == 4 and all(0 < float(value) < 1 for value in values)


def test_own_model(capsys):
    assert len(jax.devices()) == 8
    losses = [float(row.split("loss ")[1]) for row in run_example("own_model.py", capsys)]
    assert losses[-1] < losses[0] / 100


def test_who_taught_it(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["who_taught_it.py", "--documents", "40"])
    answer, _, *places = run_example("who_taught_it.py", capsys)
    assert answer == "Fenando Jelarbeck was born in Veltastrand."
    assert [int(place.split()[0]) for place in places] == [1, 2, 3, 4, 5, -2, -1]
    assert "was born in Veltastrand" in places[0]  # the one that states it


def test_the_notebook_runs(capsys):
    notebook = json.loads((EXAMPLES / "who_taught_it.ipynb").read_text(encoding="utf-8"))
    session: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]  # they would grow old
            exec(compile("".join(cell["source"]), "notebook", "exec"), session)  # noqa: S102
    said = capsys.readouterr().out
    assert "% of 516,960 parameters are recorded" in said and said.count("Veltastrand") > 1


def test_a_model_without_linears_is_refused():
    problem = jhessians.Problem(lambda model, batch: 0.0, nnx.Module(), {})
    with pytest.raises(ValueError, match="no linears to fit"):
        jhessians.fit(problem, [], positions=0, documents=0)
