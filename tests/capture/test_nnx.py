"""Models made of Flax's own linears, against `jax.grad` of one document at a time in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.folds.second_moment import SecondMoment
from jhessians.linalg.symmetric import unpack
from tests import small
from tests.capture import gradients
from tests.small import relative_error
from tests.tolerances import FACTORS, INVARIANCE

N, S, D = 4, 3, 6


class Everything(nnx.Module):
    """One of each of Flax's linears, with options that change how they multiply."""

    def __init__(self, rngs):
        self.plain = nnx.Linear(D, 8, dtype=jnp.float32, precision="highest", rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.heads = nnx.LinearGeneral((2, 4), (3, 2), axis=(-2, -1), rngs=rngs)
        self.middle = nnx.LinearGeneral(3, 5, axis=-2, use_bias=False, rngs=rngs)
        self.einsum = nnx.Einsum("nsca,hab->nshcb", (2, 5, 3), (2, 3), rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(12, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.low_rank = nnx.LoRA(4, 2, 4, base_module=nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
        self.adapted = nnx.LoRALinear(4, 5, lora_rank=2, use_bias=False, rngs=rngs)
        self.holder = nnx.data({"linears": [nnx.Linear(5, 3, rngs=rngs)]})

    def __call__(self, x):
        h = jnp.tanh(self.plain(x))
        h = self.attention(h)
        h = self.heads(h.reshape(*h.shape[:2], 2, 4))
        h = self.middle(jnp.tanh(h)).reshape(*h.shape[:2], 2, 5)
        h = jnp.tanh(self.einsum(h)).reshape(*h.shape[:2], 12)
        h = jnp.tanh(self.blocks[1](jnp.tanh(self.blocks[0](h))))
        h = self.adapted(jnp.tanh(self.low_rank(h)))
        return self.holder["linears"][0](jnp.tanh(h))


# Site -> which of the kernel's axes are input features, and whether there is a bias.
EVERYTHING = {
    "plain": (1, True),
    "attention.query": (1, True),
    "attention.key": (1, True),
    "attention.value": (1, True),
    "attention.out": (2, True),
    "heads": (2, True),
    "middle": (1, False),
    "einsum": ((1,), True),
    "blocks.0": (1, True),
    "blocks.1": (1, True),
    "low_rank.lora_a": (1, False),
    "low_rank.lora_b": (1, False),
    "low_rank.base_module": (1, True),
    "adapted": (1, False),
    "adapted.lora.lora_a": (1, False),
    "adapted.lora.lora_b": (1, False),
    "holder.linears.0": (1, True),
}


def squares(model, batch):
    y = model(batch)
    return jnp.sum(jnp.square(y)) + 0.3 * jnp.sum(y)


def data(n=N, s=S, d=D, seed=0):
    return np.random.default_rng(seed).standard_normal((n, s, d)).astype(np.float32)


def second_moments(loss, model, batch, *, include_bias=False, mesh=None):
    """Sites, and the sums over documents of squared gradients, [out, in] with the bias's column."""
    sites = jhessians.find_sites(loss, model, batch, include_bias=include_bias)
    problem = jhessians.Problem(loss, model, sites, mesh=mesh)
    fold = SecondMoment()
    graph, state = nnx.split(model)

    @jax.jit
    def sums(state, batch, zeros):
        return jhessians.accumulate(fold, problem.of(nnx.merge(graph, state)), batch, zeros)[0]

    found = sums(state, batch, jhessians.initialize(fold, problem))
    result = {}
    for name, site in sites.items():
        result[name] = np.asarray(found[name]["weight"])[..., : site.out_features, :]
        if site.ones:
            bias = np.asarray(found[name]["bias"])[: site.out_features, None]
            result[name] = np.concatenate([result[name], bias], axis=1)
    return sites, result


def expected_moment(documents, path, **how):
    return sum(np.square(gradients.matrix(each, path, **how)) for each in documents)


@pytest.mark.parametrize("devices", [None, 4])
def test_every_linear_of_flax_has_the_gradients_that_jax_grad_has(devices):
    model, batch = small.fill(lambda: Everything(nnx.Rngs(0))), data()
    mesh = None if devices is None else jhessians.make_mesh(devices)
    sites, found = second_moments(squares, model, batch, include_bias=True, mesh=mesh)
    assert set(sites) == set(EVERYTHING)
    assert sites.coverage.share == 1 and not sites.passed_over
    documents = gradients.of_documents(squares, model, batch)
    for name, (inputs, bias) in EVERYTHING.items():
        assert sites[name].ones == bias and sites[name].calls == 1
        expected = expected_moment(documents, name, inputs=inputs, bias=bias)
        assert relative_error(found[name], expected) < FACTORS, name
    # Query, key and value read one array.
    assert {sites[f"attention.{n}"].input_site for n in ("query", "key", "value")} == {
        "attention.query"
    }
    assert model.plain.dot_general is jax.lax.dot_general  # nothing stays on the model
    assert type(model.low_rank) is nnx.LoRA


class Ours(nnx.Module):
    def __init__(self, linear, rngs):
        self.first = linear(D, 5, rngs=rngs)
        self.second = linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_numbers_are_those_of_our_own_linear():
    batch, mask = data(), np.random.default_rng(1).random((N, S)) < 0.7
    found = []
    for linear in (nnx.Linear, jhessians.Linear):
        model = small.fill(lambda linear=linear: Ours(linear, nnx.Rngs(0)))
        sites = jhessians.find_sites(squares, model, batch, include_bias=True)
        problem = jhessians.Problem(squares, model, sites, mask=lambda batch: mask)
        fold = jhessians.Covariance()
        statistics, value = jhessians.accumulate(
            fold, problem, batch, jhessians.initialize(fold, problem)
        )
        found.append((dict(sites), jax.tree.map(np.asarray, statistics), float(value)))
    (sites, ours, value), (other_sites, theirs, other_value) = found
    assert sites == other_sites and value == pytest.approx(other_value, rel=1e-6)
    for name, site in sites.items():
        for kind, size in (("activation", site.inputs), ("gradient", site.out_features)):
            pair = (unpack(each[name][kind], size) for each in (ours, theirs))
            assert relative_error(*pair) < INVARIANCE


class Stacked(nnx.Module):
    """Flax's linears inside our stack."""

    def __init__(self, rngs):
        self.stack = jhessians.Stack(lambda r: Residual(r), 3, rngs=rngs)

    def __call__(self, x):
        return self.stack(x)


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(self.norm(x)))


def test_linears_of_flax_inside_a_stack():
    model, batch = small.fill(lambda: Stacked(nnx.Rngs(0))), data()
    sites, found = second_moments(squares, model, batch)
    assert list(sites) == ["stack.{layer}.linear"]
    assert sites["stack.{layer}.linear"].members == (0, 1, 2)
    documents = gradients.of_documents(squares, model, batch)
    kernels = [each["stack"]["blocks"]["linear"]["kernel"] for each in documents]
    expected = sum(np.square(np.asarray(each).swapaxes(1, 2)) for each in kernels)
    assert relative_error(found["stack.{layer}.linear"], expected) < FACTORS
