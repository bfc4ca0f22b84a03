"""Gauss-Newton products against a dense matrix in float64, made of every logit's gradient."""

from dataclasses import replace
from functools import cache, cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.influence.gauss_newton import GaussNewtonPass
from jhessians.models.config import ExpertsConfig, MLPConfig
from jhessians.models.layers import Linear
from jhessians.models.lora import LoRA, freeze
from tests import small
from tests.small import LLAMA, relative_error
from tests.test_invariance import sharded

LENGTHS = [6, 3, 5, 1, 4, 2, 7]
VOCABULARY = 11
SIZES = {"hidden_size": 8, "heads": 1, "mlp_size": 6, "vocabulary_size": VOCABULARY}
MODELS = {
    "gpt_neox": {"layers": 2},
    "llama": {"layers": 1, **LLAMA},
    "experts": {"layers": 1, "experts": ExpertsConfig(3, 2, MLPConfig(6, "silu", "fused"))},
    "capped": {"layers": 1, "logit_softcap": 2.0},
}


class Case:
    """A problem in float64 and its dense Gauss-Newton matrix."""

    def __init__(self, name, change=lambda model: model):
        graph, state = nnx.split(small.decoder(**SIZES, **MODELS[name]))
        wide = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), state))
        self.model = change(wide)
        self.documents = small.documents(LENGTHS, vocabulary=VOCABULARY)
        self.plan = {"token_batch_size": 16, "max_shapes": 2}

    def problem(self, devices=1, reduction="sum", model=None):
        model = model or self.model
        loss = jhessians.NextTokenLoss("dataset", reduction)
        batches = small.batches(self.documents, devices=devices, **self.plan)
        sites = jhessians.find_sites(loss, model, batches[0], include_bias=True)
        mesh = jhessians.make_mesh(devices) if devices > 1 else None
        return jhessians.Problem(loss, model, sites, mesh=mesh), batches

    @cached_property
    def shapes(self):
        sites = self.problem()[0].sites.values()
        return {n: (s.out_features, s.inputs) for s in sites for n in s.module_names()}

    def vectors(self, count=3):
        random = np.random.default_rng(0)
        return {n: random.standard_normal((count, *shape)) for n, shape in self.shapes.items()}

    def flat(self, matrices):
        """[vector, all weights]"""
        parts = [np.asarray(matrices[n]).reshape(len(matrices[n]), -1) for n in self.shapes]
        return np.concatenate(parts, 1)

    @cached_property
    def parts(self):
        """Of every document with a label: the logits [position, v], and their Jacobian."""
        offsets = self.documents.offsets
        ends = zip(offsets[:-1], offsets[1:], strict=True)
        documents = [self.documents.tokens[a:b] for a, b in ends if b - a > 1]
        # All as long as the longest, for one compilation: no logit depends on what follows it.
        length = max(LENGTHS)
        padded = [np.pad(tokens, (0, length - len(tokens))) for tokens in documents]
        logits = np.asarray(self.model(jnp.asarray(np.stack(padded))))
        jacobians = self.jacobians(padded).reshape(len(documents), length - 1, VOCABULARY, -1)
        found = zip(documents, logits, jacobians, strict=True)
        return [(z[: len(x) - 1], jacobian[: len(x) - 1]) for x, z, jacobian in found]

    def jacobians(self, documents):
        """[every document's logits, all weights]: each in a row of its own, with its gradient."""
        length = len(documents[0])
        rows = (length - 1) * VOCABULARY
        batches = [
            {
                "tokens": np.tile(tokens, (rows, 1)),
                "place": np.repeat(np.arange(length - 1), VOCABULARY),
                "logit": np.tile(np.arange(VOCABULARY), length - 1),
                "position_mask": np.ones((rows, length), bool),
            }
            for tokens in documents
        ]

        def one_logit(model, batch):
            logits = model(jnp.asarray(batch["tokens"]))
            of_place = jnp.take_along_axis(logits, batch["place"][:, None, None], 1)[:, 0]
            return jnp.take_along_axis(of_place, batch["logit"][:, None], 1).sum()

        problem = replace(self.problem()[0], loss=one_logit)
        fold = jhessians.DocumentGradients(jnp.float64)
        return self.flat(jhessians.map_documents(fold, problem, batches))

    def dense(self, reduction="sum"):
        total = 0
        for logits, jacobian in self.parts:
            weight = 1 if reduction == "sum" else 1 / len(logits)
            for z, j in zip(logits, jacobian, strict=True):
                p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                total = total + weight * j.T @ (np.diag(p) - np.outer(p, p)) @ j
        return total


@cache
def gpt_neox():
    """One for all tests, whose dense matrix takes long; made where JAX has 64 bits."""
    return Case("gpt_neox")


def damped(case, factors):
    """G + D of every document, dense."""
    damping = [
        np.full(x.size, factors.inverse.damping_factor * np.asarray(x).mean())
        for x in (factors["eigenvalue_correction"][name] for name in case.shapes)
    ]
    return case.dense() / len(LENGTHS) + np.diag(np.concatenate(damping))


def with_adapters(model):
    """A copy of the model whose linears are frozen and have adapters of rank 2."""
    model = nnx.merge(*nnx.split(model), copy=True)
    freeze(model)
    rngs = nnx.Rngs(1)
    linears = [m for _, m in nnx.iter_modules(model.layers.blocks) if isinstance(m, Linear)]

    def adapter(inputs, outputs):
        def create(rngs):
            return LoRA(inputs, outputs, 2, scale=0.5, dtype=jnp.float64, rngs=rngs)

        return nnx.vmap(create)(rngs.split(model.layers.count))

    for each in linears:
        each.adapter = adapter(each.in_features, each.out_features)
    return model


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in ("gpt_neox", "experts") else pytest.mark.slow)
        for name in MODELS
    ],
)
def case(request):
    with jax.enable_x64(True):
        yield gpt_neox() if request.param == "gpt_neox" else Case(request.param)


@pytest.fixture(scope="module")
def single():
    with jax.enable_x64(True):
        yield gpt_neox()


@pytest.mark.parametrize("devices", [1, 4])
def test_products_are_those_of_the_dense_matrix(case, devices):
    problem, batches = case.problem(devices)
    found = jhessians.gauss_newton_product(problem, batches, case.vectors())
    expected = case.flat(case.vectors()) @ case.dense()
    assert relative_error(case.flat(found), expected) < 1e-10


@pytest.mark.parametrize(
    "reduction", ["mean_gradient", pytest.param("mean", marks=pytest.mark.slow)]
)
def test_the_mean_over_a_documents_positions(single, reduction):
    problem, batches = single.problem(reduction=reduction)
    found = jhessians.gauss_newton_product(problem, batches, single.vectors())
    expected = single.flat(single.vectors()) @ single.dense("mean")
    assert relative_error(single.flat(found), expected) < 1e-10


def test_the_matrix_is_symmetric_and_positive_semi_definite(single):
    problem, batches = single.problem()
    vectors = single.vectors(8)
    found = jhessians.gauss_newton_product(problem, batches, vectors)
    among = single.flat(vectors) @ single.flat(found).T
    assert np.abs(among - among.T).max() < 1e-12 * np.abs(among).max()
    assert np.linalg.eigvalsh(among).min() > 0


def test_a_model_that_is_spread_over_the_devices(single, monkeypatch):
    monkeypatch.setattr("jhessians.devices.mesh.SMALLEST_SHARD", 1)
    problem, batches = single.problem(devices=4)
    problem = replace(problem, model=sharded(single.model, problem.mesh))
    found = jhessians.gauss_newton_product(problem, batches, single.vectors())
    expected = single.flat(single.vectors()) @ single.dense()
    assert relative_error(single.flat(found), expected) < 1e-10


def test_vectors_go_through_the_model_in_blocks(single, monkeypatch):
    monkeypatch.setattr("jhessians.influence.gauss_newton.VECTORS_AT_ONCE", 2)
    problem, batches = single.problem()
    found = jhessians.gauss_newton_product(problem, batches, single.vectors(3))
    expected = single.flat(single.vectors(3)) @ single.dense()
    assert relative_error(single.flat(found), expected) < 1e-10


def test_the_order_of_vectors_does_not_matter():
    """At a size where jaxlib 0.10.2 adds up wrongly for all but the first."""
    model = small.decoder(hidden_size=64, heads=1, mlp_size=64, layers=1, **LLAMA)
    batches = small.batches(small.documents([64] * 16, vocabulary=11), token_batch_size=1024)
    loss = jhessians.NextTokenLoss("dataset")
    sites = jhessians.find_sites(loss, model, batches[0])
    random = np.random.default_rng(0)
    vectors = {
        name: random.standard_normal((4, site.out_features, site.inputs), np.float32)
        for site in sites.values()
        for name in site.module_names()
    }
    product = GaussNewtonPass(jhessians.Problem(loss, model, sites))
    found = product.run(batches, vectors)
    turned = product.run(batches, {name: np.roll(x, 1, 0) for name, x in vectors.items()})
    for name, x in found.items():
        assert relative_error(turned[name], np.roll(x, 1, 0)) < 1e-5


def test_inside_a_callers_own_jit(single):
    problem, (batch, *_) = single.problem()
    vectors = single.vectors()
    zeros = jax.tree.map(jnp.zeros_like, vectors)
    found = jax.jit(lambda v: jhessians.add_gauss_newton_product(problem, batch, v, zeros))(vectors)
    expected = jhessians.gauss_newton_product(problem, [batch], vectors)
    assert relative_error(single.flat(found), single.flat(expected)) < 1e-12
    with pytest.raises(TypeError):
        jax.jit(lambda v: jhessians.gauss_newton_product(problem, [batch], v))(vectors)


@pytest.mark.usefixtures("single")  # for its 64 bits
def test_adapters_are_linears_like_others():
    adapted = Case("gpt_neox", with_adapters)
    assert all("lora" in name for name in adapted.shapes)
    problem, batches = adapted.problem()
    found = jhessians.gauss_newton_product(problem, batches, adapted.vectors())
    expected = adapted.flat(adapted.vectors()) @ adapted.dense()
    assert relative_error(adapted.flat(found), expected) < 1e-10


def test_other_losses_and_other_vectors_are_refused(single):
    problem, batches = single.problem()
    vectors = single.vectors()
    first, *_ = vectors
    with pytest.raises(ValueError, match=f"no vectors of {first}"):
        without = {name: x for name, x in vectors.items() if name != first}
        jhessians.gauss_newton_product(problem, batches, without)
    with pytest.raises(ValueError, match="vectors of an unknown module z"):
        jhessians.gauss_newton_product(problem, batches, {**vectors, "z": vectors[first]})
    with pytest.raises(ValueError, match=r"have shape \[3, .*expected \[2, "):
        jhessians.gauss_newton_product(
            problem, batches, {name: x[: 2 if name == first else 3] for name, x in vectors.items()}
        )
    with pytest.raises(ValueError, match="no batches"):
        jhessians.gauss_newton_product(problem, [], vectors)
    with pytest.raises(TypeError, match="function has no methods"):
        other = replace(problem, loss=lambda model, batch: problem.loss(model, batch))
        jhessians.gauss_newton_product(other, batches, vectors)
    with pytest.raises(ValueError, match="log_odds isn't known; expected cross_entropy"):
        odds = replace(problem, loss=replace(problem.loss, function="log_odds"))
        jhessians.gauss_newton_product(odds, batches, vectors)
