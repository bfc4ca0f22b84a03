"""Every parameter of a model is recorded or listed, each once, with the reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.capture.sites import restrict, unshared
from jhessians.models.lora import LoRA, freeze
from tests import small

TOKENS = np.zeros((2, 4), np.int32)


class Net(nnx.Module):
    """Linears among other layers, a weight that serves twice, one that is never called."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])
        self.tied = nnx.Linear(6, 11, use_bias=False, rngs=rngs)
        self.table = self.tied.kernel
        self.unused = nnx.Linear(6, 5, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, tokens):
        h = self.embed(tokens)
        for block in self.blocks:
            h = h + block(h)
        return self.tied(h) * self.scale[...] + h @ self.table[...]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, h):
        return self.dropout(self.linear(self.norm(h)))


def total(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def loss(model, tokens):
    return jnp.sum(jnp.square(model(tokens)))


def sizes(coverage):
    return sum(each.count * int(np.prod(each.shape)) for each in coverage.passed_over)


@pytest.mark.parametrize("include_bias", [False, True])
def test_all_parameters_of_a_model_of_flax(include_bias):
    model = Net(nnx.Rngs(0))
    sites = jhessians.find_sites(loss, model, TOKENS, include_bias=include_bias)
    assert list(sites) == [f"blocks.{i}.linear" for i in range(3)]
    coverage = sites.coverage
    assert coverage.recorded == 3 * (36 + 6 * include_bias)
    assert coverage.total == total(model) == coverage.recorded + sizes(coverage)
    listed = {each.path: (each.shape, each.count, each.reason) for each in coverage.passed_over}
    expected = {
        "embed.embedding": ((11, 6), 1, "of Embed, which is not a linear"),
        "blocks.*.norm.scale": ((6,), 3, "of LayerNorm, which is not a linear"),
        "blocks.*.norm.bias": ((6,), 3, "of LayerNorm, which is not a linear"),
        "tied.kernel": ((6, 11), 1, "of linears whose weight serves elsewhere too, as table"),
        "unused.kernel": ((6, 5), 1, "of linears that the loss never calls"),
        "unused.bias": ((5,), 1, "of linears that the loss never calls"),
        "scale": ((), 1, "of Net, which is not a linear"),
    }
    if not include_bias:
        reason = "biases, which count only where sites include them"
        expected["blocks.*.linear.bias"] = ((6,), 3, reason)
    assert listed == expected
    first, *rest = coverage.lines()
    share = 100 * coverage.recorded / coverage.total
    assert first == f"{share:.1f} % of {coverage.total} parameters are recorded"
    assert "passed over, of Embed, which is not a linear: embed.embedding ([11, 6])" in rest
    assert len(rest) == len({each.reason for each in coverage.passed_over})
    assert str(coverage) == "\n".join([first, *rest])


def test_a_selection_is_accounted_for():
    model = Net(nnx.Rngs(0))
    sites = jhessians.find_sites(loss, model, TOKENS)
    one = restrict(sites, lambda name: name == "blocks.1.linear")
    assert one.coverage.recorded == 36 and one.coverage.total == sites.coverage.total
    left = {each.path: each for each in one.passed_over}["blocks.*.linear.kernel"]
    assert (left.count, left.reason) == (2, "left out by the selection")
    assert unshared(one).coverage == one.coverage
    assert restrict(dict(sites), lambda name: True).coverage.total == 0  # nothing is known


def test_a_decoder_lists_what_all_its_layers_have_once():
    model = small.decoder(**small.LLAMA, layers=3)
    (batch,) = small.batches(small.documents([5, 7]))
    next_token = jhessians.NextTokenLoss("dataset")
    sites = jhessians.find_sites(next_token, model, batch, include_bias=True)
    coverage = sites.coverage
    assert coverage.total == total(model) == coverage.recorded + sizes(coverage)
    assert [each.path for each in coverage.passed_over if "norm" not in each.path] == [
        "embedding", "head"
    ]  # fmt: skip
    assert {each.path: each.shape for each in coverage.passed_over if "norm" in each.path} == {
        "layers.{layer}.attention_norm.scale": (3, 16),
        "layers.{layer}.mlp_norm.scale": (3, 16),
        "final_norm.scale": (16,),
    }
    some = restrict(sites, lambda name: name == "layers.1.mlp.down")
    assert some.coverage.recorded == 24 * 16
    reasons = {each.path: each.reason for each in some.passed_over}
    assert reasons["layers.{layer}.mlp.down.kernel"] == "other than 1 selected of 3 linears"
    assert reasons["layers.{layer}.mlp.up.kernel"] == "left out by the selection"


def test_frozen_linears_beside_their_adapters_are_listed():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = jhessians.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    model = Model(nnx.Rngs(0))
    freeze(model)
    model.linear.adapter = LoRA(4, 3, 2, scale=1.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
    sites = jhessians.find_sites(loss, model, np.zeros((2, 1, 4), np.float32))
    assert list(sites) == ["linear.adapter.lora_A", "linear.adapter.lora_B"]
    assert sites.coverage.recorded == 4 * 2 + 2 * 3
    assert {(each.path, each.reason) for each in sites.passed_over} == {
        ("linear.kernel", "of frozen linears"), ("linear.bias", "of frozen linears")
    }  # fmt: skip


def test_dropout_and_batch_statistics_can_be_written_to():
    """Layers may change their own state during a pass; the caller's model stays as it is."""

    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dropout(self.linear(x)))

    model, batch = Noisy(nnx.Rngs(0)), np.ones((2, 3, 4), np.float32)
    before = jax.tree.leaves(nnx.state(model, nnx.BatchStat, nnx.RngCount))
    sites = jhessians.find_sites(loss, model, batch)
    assert {each.path for each in sites.passed_over} == {"linear.bias", "norm.scale", "norm.bias"}
    fold, problem = jhessians.Covariance(), jhessians.Problem(loss, model, sites)
    jhessians.accumulate(fold, problem, batch, jhessians.initialize(fold, problem))
    after = jax.tree.leaves(nnx.state(model, nnx.BatchStat, nnx.RngCount))
    assert all((x == y).all() for x, y in zip(before, after, strict=True))
