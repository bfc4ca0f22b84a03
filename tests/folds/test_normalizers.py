"""Normalizers against bergson's own, and the second moments they are estimated from."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bergson.collector.collector import OuterProductGradients
from bergson.gradients import AdafactorNormalizer as TheirAdafactor
from bergson.gradients import AdamNormalizer as TheirAdam
from flax import nnx

from jhessians.capture.fold import Context
from jhessians.capture.problem import Problem
from jhessians.capture.site import Site
from jhessians.capture.sites import find_sites
from jhessians.devices.mesh import make_mesh
from jhessians.errors import CheckpointError, ConfigError
from jhessians.fitting.passes import run_pass
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer
from jhessians.folds.second_moment import SecondMoment, stack_normalizers
from jhessians.models.layers import Linear, Stack
from tests.oracles import kfac_numpy
from tests.small import relative_error
from tests.tolerances import FACTORS, INVARIANCE

O, I = 5, 7  # noqa: E741


def moments(seed=0, leading=()):
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.standard_normal((*leading, *shape)).astype(np.float32)  # noqa: E731
    v = draw(O, I) ** 2
    v[..., 0, :] = 0  # a weight without any gradient must not divide by zero
    return v, draw(O) ** 2


def normalizers(v, b):
    adam = AdamNormalizer(v, b)
    return {"adam": adam, "adafactor": adam.to_adafactor()}


def theirs_of(kind, v, b):
    adam = TheirAdam(torch.from_numpy(v.copy()), torch.from_numpy(b.copy()))
    return adam if kind == "adam" else adam.to_adafactor()


def documents_of(seed=1, n=3, s=11):
    random = np.random.default_rng(seed)
    a = random.standard_normal((n, s, I)).astype(np.float32)
    return a, random.standard_normal((n, s, O)).astype(np.float32)


def their_gradients(normalizer, a, g):
    """What bergson's collector forms from a, g and its normalizer, with the bias's column."""
    a, g = torch.from_numpy(a), torch.from_numpy(g)
    bias = normalizer.normalize_bias(g).sum(dim=1)
    divisor = None
    if isinstance(normalizer, TheirAdafactor):
        a = a * normalizer.col.add(1e-30).rsqrt()
        factor = normalizer.row.add(1e-30)
        g = g * (factor.mean().sqrt() * factor.rsqrt())
    else:
        divisor = torch.nn.functional.pad(normalizer.weight_denominator(), (0, 1), value=1.0)
    column = torch.zeros(I + 1)
    column[I] = 1
    a = torch.nn.functional.pad(a, (0, 1))
    return OuterProductGradients(g, a, bias, column, divisor).materialize().numpy()


@pytest.mark.parametrize("kind", ["adam", "adafactor"])
def test_gradients_are_scaled_as_bergson_scales_them(kind):
    v, b = moments()
    a, g = documents_of()
    with_ones = np.concatenate([a, np.ones((*a.shape[:2], 1), np.float32)], -1)
    gradients = jnp.einsum("nso,nsi->noi", jnp.asarray(g), jnp.asarray(with_ones))
    scale = jax.jit(lambda x, gradients: x.normalize(gradients, include_bias=True))
    found = scale(normalizers(v, b)[kind], gradients)
    expected = their_gradients(theirs_of(kind, v, b), a, g)
    # By row: the one without gradients is huge, and would hide the others.
    for row in range(O):
        assert relative_error(found[:, row], expected[:, row]) < FACTORS
    weights = normalizers(v, None)[kind].normalize(gradients[..., :-1])
    np.testing.assert_allclose(weights, found[..., :-1], rtol=1e-6)


def test_factors_on_g_and_a_do_what_scaling_the_gradient_does():
    v, b = moments()
    a, g = documents_of()
    normalizer = normalizers(v, b)["adafactor"]
    g_factor, a_factor = np.asarray(normalizer.g_factor()), np.asarray(normalizer.a_factor())
    scaled = np.einsum("nso,nsi->noi", g * g_factor, a * a_factor)
    gradients = jnp.asarray(np.einsum("nso,nsi->noi", g, a))
    for row in range(O):
        found = normalizer.normalize(gradients)[:, row]
        assert relative_error(found, scaled[:, row]) < FACTORS
    biases = g.sum(1) * np.asarray(normalizer.bias_factor())
    whole = jnp.concatenate([gradients, jnp.asarray(g.sum(1))[..., None]], -1)
    found = normalizer.normalize(whole, include_bias=True)[..., -1]
    assert relative_error(found, biases) < FACTORS


def test_the_two_kinds_become_one_another_as_in_bergson():
    v, b = moments()
    v = v + 1
    ours, theirs = AdamNormalizer(v, b).to_adafactor(), theirs_of("adafactor", v, b)
    assert relative_error(ours.row, theirs.row) < INVARIANCE
    assert relative_error(ours.col, theirs.col) < INVARIANCE
    dense = theirs.to_adam()
    assert relative_error(ours.to_adam().weight_avg_sq, dense.weight_avg_sq) < INVARIANCE
    assert ours.to_adam().bias_avg_sq is b


@pytest.mark.parametrize("kind", ["adam", "adafactor"])
def test_leading_axes_and_rows_of_a_head(kind):
    v, b = moments(leading=(2,))
    gradients = jnp.asarray(np.random.default_rng(3).standard_normal((2, O, I + 1)), jnp.float32)
    stacked = normalizers(v, b)[kind]
    found = stacked.normalize(gradients, include_bias=True)
    for layer in range(2):
        single = jax.tree.map(lambda x, i=layer: x[i], stacked)
        expected = single.normalize(gradients[layer], include_bias=True)
        np.testing.assert_allclose(found[layer], expected, rtol=1e-6)
    single = jax.tree.map(lambda x: x[0] + 1, stacked)
    head = single.rows(1, 3)
    found = head.normalize(gradients[0, 1:3], include_bias=True)
    expected = normalizers(v[0] + 1, b[0] + 1)["adam"].rows(1, 3)
    if kind == "adafactor":
        expected = AdafactorNormalizer(single.row[1:3], single.col, single.bias_avg_sq[1:3])
    expected = expected.normalize(gradients[0, 1:3], include_bias=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["adam", "adafactor"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_is_scaled_keeps_its_type(kind, dtype):
    v, b = moments()
    normalizer = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), normalizers(v, b)[kind])
    gradients = jnp.ones((4, O, I + 1), dtype)
    assert normalizer.normalize(gradients, include_bias=True).dtype == dtype


@pytest.mark.parametrize("kind", ["adam", "adafactor"])
def test_a_bias_without_second_moment_is_refused(kind):
    v, _ = moments()
    with pytest.raises(ConfigError, match="no second moment of the bias"):
        normalizers(v, None)[kind].normalize(jnp.ones((O, I + 1)), include_bias=True)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("factored", [True, False])
def test_second_moments_are_sums_of_squared_document_gradients(factored, ones, with_mask):
    a, g = documents_of()
    mask = np.random.default_rng(0).random(a.shape[:2]) < 0.7
    where = Site("linear", I, O, use_bias=ones, ones=ones, input_site="linear")
    context = Context(mask=jnp.asarray(mask) if with_mask else None)
    fold = SecondMoment(factored)
    found = fold.term(where, jnp.asarray(a), jnp.asarray(g), {}, context)
    announced = fold.shapes(where)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), announced
    )
    g = np.where(mask[..., None], g, 0) if with_mask else g
    squares = sum(
        kfac_numpy.weight_gradient(d) ** 2
        for d in kfac_numpy.with_bias(list(zip(a, g, strict=True)))
    )
    weight, bias = squares[:, :I], squares[:, I]
    expected = {"weight": weight}
    if factored:
        expected = {"row": weight.mean(1), "col": weight.mean(0)}
    expected |= {"bias": bias} if ones else {}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert relative_error(found[name], value) < FACTORS


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


class Toy(nnx.Module):
    """A stack and a linear without bias, quick to compile."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stack = Stack(Block, 2, rngs=rngs)
        self.head = Linear(4, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(self.stack(x))


def toy_loss(model, batch):
    return jnp.sum(jnp.sin(model(batch["x"])) ** 2)


@cache
def estimated(*, factored, rows=6, parts=1, devices=1):
    """Normalizers of a toy, from the first `rows` of its documents in `parts` batches."""
    x = np.random.default_rng(0).standard_normal((6, 5, 4)).astype(np.float32)
    planned = [{"x": part} for part in np.split(x[:rows], parts)]
    model = Toy()
    sites = find_sites(toy_loss, model, planned[0], include_bias=True)
    mesh = make_mesh(devices) if devices > 1 else None
    problem = Problem(toy_loss, model, sites, mask=lambda batch: None, mesh=mesh)
    fold = SecondMoment(factored)
    return fold.finish(sites, run_pass(fold, problem, planned), documents=rows), sites


@pytest.mark.parametrize("factored", [True, False])
def test_an_estimate_does_not_move_with_batch_or_mesh(factored):
    once, sites = estimated(factored=factored)
    again, _ = estimated(factored=factored, parts=2, devices=3)
    assert list(once) == [name for site in sites.values() for name in site.module_names()]
    for name in once:
        expected = jax.tree.leaves(once[name])
        assert len(expected) == 1 + factored + (name != "head")  # the head has no bias to count
        for x, y in zip(jax.tree.leaves(again[name]), expected, strict=True):
            assert relative_error(x, y) < INVARIANCE


def test_an_estimate_is_a_mean_over_documents_and_adafactors_is_its_means():
    dense, _ = estimated(factored=False)
    first, _ = estimated(factored=False, rows=3)
    factored, _ = estimated(factored=True)
    for name, normalizer in dense.items():
        v = normalizer.weight_avg_sq
        assert (v > first[name].weight_avg_sq * 3 / 6 - 1e-6).all()  # sums only grow
        assert relative_error(factored[name].row, v.mean(1)) < FACTORS
        assert relative_error(factored[name].col, v.mean(0)) < FACTORS


def test_normalizers_of_modules_are_stacked_for_their_sites():
    found, sites = estimated(factored=False)
    stacked = stack_normalizers(sites, found | {"another": found[next(iter(found))]})
    assert set(stacked) == set(sites)
    for site in sites.values():
        for slot, name in enumerate(site.module_names()):
            slot = ... if site.members is None else slot
            for x, y in zip(
                jax.tree.leaves(stacked[site.name]), jax.tree.leaves(found[name]), strict=True
            ):
                np.testing.assert_array_equal(x[slot], y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: None, "there is no normalizer for"),
        (lambda x: AdamNormalizer(x.weight_avg_sq[:-1], x.bias_avg_sq[:-1]), "expected .*out, in"),
        (lambda x: AdamNormalizer(x.weight_avg_sq), "no second moment of the bias"),
        (lambda x: AdamNormalizer(x.weight_avg_sq[:, :-1], x.bias_avg_sq), "expected .*out, in"),
        (lambda x: x.to_adafactor(), "of different kinds"),
    ],
)
def test_normalizers_that_do_not_fit_are_refused(change, message):
    found, sites = estimated(factored=False)
    name = next(name for name in found if name != "head")
    changed = change(found[name])
    rest = {key: value for key, value in found.items() if key != name}
    with pytest.raises(CheckpointError, match=message) as caught:
        stack_normalizers(sites, rest if changed is None else rest | {name: changed})
    assert "\n" not in str(caught.value)
