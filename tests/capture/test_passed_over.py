"""What can't be recorded is listed with the reason, and never disturbs what is recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jhessians
from jhessians.folds.second_moment import SecondMoment
from tests.capture import gradients
from tests.capture.test_nnx import D, N, Ours, S, data, expected_moment, second_moments, squares
from tests.small import relative_error
from tests.tolerances import FACTORS


class Holder(nnx.Module):
    """A linear that is recorded, beside something that may not be."""

    def __init__(self, other, rngs):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.other = other(rngs)

    def __call__(self, x):
        return self.other(jnp.tanh(self.first(x)))


class Own(nnx.Linear):
    """A linear that multiplies without what Flax's multiplies with."""

    def __call__(self, inputs, out_sharding=None):
        return inputs @ self.kernel[...]


class Transformed(nnx.Module):
    """A linear that is called inside a transformation."""

    def __init__(self, transform, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)
        self.transform = transform

    def __call__(self, x):
        return self.transform(self.linear)(x)


class Scanned(nnx.Module):
    """Layers that `nnx.vmap` made and `nnx.scan` runs."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda r: nnx.Linear(D, D, rngs=r))(rngs.split(3))

    def __call__(self, x):
        def step(x, layer):
            return jnp.tanh(layer(x))

        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class Flattened(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.reshape(-1, D))


class AlongDocuments(nnx.Module):
    """Two linears that can't be told by one document alone."""

    def __init__(self, rngs):
        self.each = nnx.LinearGeneral(D, D, batch_axis={0: N}, rngs=rngs)
        self.mixed = nnx.LinearGeneral(N, N, axis=0, rngs=rngs)

    def __call__(self, x):
        return self.mixed(self.each(x))


def test_kernels_along_the_axis_of_documents_are_listed():
    sites = jhessians.find_sites(squares, Holder(AlongDocuments, nnx.Rngs(0)), data())
    assert list(sites) == ["first"]
    reasons = {each.path: each.reason for each in sites.passed_over}
    assert "a kernel of its own" in reasons["other.each.kernel"]
    assert "the documents, is not kept in place" in reasons["other.mixed.kernel"]


def einsum(equation, shape):
    return lambda rngs: nnx.Einsum(equation, shape, rngs=rngs)


NOT_RECORDED = {
    "convolution": (lambda r: nnx.Conv(D, D, (3,), rngs=r), "Conv, which is not a linear"),
    "own product": (lambda r: Own(D, D, rngs=r), "Own, which the loss never calls or which"),
    "kernel per position": (einsum("nsi,sio->nso", (S, D, D)), "a kernel of its own"),
    "outer product": (einsum("nsi,ij->nsij", (D, 2)), "a kernel of its own"),
    "sum over positions": (einsum("nsi,io->no", (D, D)), "an axis that only one"),
    "documents not first": (einsum("nsi,io->sno", (D, D)), "the documents, is not kept in place"),
    "vmap": (lambda r: Transformed(jax.vmap, r), "inside jit, scan, vmap"),
    "jit": (lambda r: Transformed(jax.jit, r), "inside jit, scan, vmap"),
    "checkpoint": (lambda r: Transformed(jax.checkpoint, r), "inside jit, scan, vmap"),
    "nnx.scan": (Scanned, "inside jit, scan, vmap"),
    "flattened": (Flattened, "documents as its first axis"),
    "linen": (
        lambda r: nnx.bridge.ToNNX(linen.Dense(D), rngs=r).lazy_init(np.zeros((N, S, D), "f4")),
        "flax.linen module",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_RECORDED)
def test_what_cannot_be_recorded_is_listed_with_the_reason(kind):
    create, reason = NOT_RECORDED[kind]
    model, batch = Holder(create, nnx.Rngs(0)), data()
    sites = jhessians.find_sites(squares, model, batch)
    assert list(sites) == ["first"]
    here = [each for each in sites.passed_over if each.path.startswith("other")]
    assert here and all(reason in each.reason for each in here), sites.coverage.lines()
    assert sum(np.prod(each.shape) for each in here) == sum(
        x.size for x in jax.tree.leaves(nnx.state(model.other, nnx.Param))
    )
    assert "passed over, " in str(sites.coverage) and reason in str(sites.coverage)
    # What is recorded is right all the same, in a pass that runs through what is not.
    documents = gradients.of_documents(squares, model, batch)
    _, found = second_moments(squares, model, batch)
    assert relative_error(found["first"], expected_moment(documents, "first")) < FACTORS

    with pytest.raises(ValueError, match="the loss calls no linear of .* that can be recorded"):
        jhessians.find_sites(lambda model, batch: squares(model.other, batch), model, batch)


def test_a_linear_that_only_the_pass_calls_inside_a_transformation_is_refused():
    model, batch = Ours(nnx.Linear, nnx.Rngs(0)), data()
    sites = jhessians.find_sites(squares, model, batch)
    fold = SecondMoment()
    for loss, message in (
        (lambda model, batch: jax.jit(squares)(model, batch), "first can't be recorded: it is"),
        (lambda model, batch: squares(model.first, batch), "the loss never calls second"),
        (lambda model, batch: jnp.sum(batch), "the loss never calls first"),
    ):
        problem = jhessians.Problem(loss, model, sites)
        with pytest.raises(ValueError, match=message):
            jhessians.accumulate(fold, problem, batch, jhessians.initialize(fold, problem))


def test_a_loss_without_linears_says_so():
    model, batch = Ours(nnx.Linear, nnx.Rngs(0)), data()
    with pytest.raises(ValueError, match="calls no linear of Ours .*which|that the loss never"):
        jhessians.find_sites(lambda model, batch: jnp.sum(batch), model, batch)
    with pytest.raises(ValueError, match="of Conv, which is not a linear; expected jhessians"):
        model = nnx.Conv(D, D, (3,), rngs=nnx.Rngs(0))
        jhessians.find_sites(squares, model, batch)
