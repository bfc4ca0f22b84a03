"""Calls of one linear that can't be put together are refused; sums over positions don't mind."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.folds.covariance import Covariance
from jhessians.folds.second_moment import SecondMoment
from jhessians.linalg.symmetric import unpack
from tests import small
from tests.capture import gradients
from tests.capture.test_calls import D, Loop, N, S, accumulated, data, squares
from tests.small import relative_error
from tests.tolerances import FACTORS


class Widths(nnx.Module):
    """One linear that reads all positions, and then their mean."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.linear(x))
        return h + self.linear(h.mean(1, keepdims=True))


class StackTwice(nnx.Module):
    """A stack that is run twice."""

    def __init__(self, rngs):
        self.stack = jhessians.Stack(lambda r: Loop(nnx.Linear, r, times=1), 2, rngs=rngs)

    def __call__(self, x):
        return self.stack(self.stack(x))


class OwnBiases(nnx.Module):
    """Two linears that share a kernel, each with a bias of its own."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)
        self.other = nnx.Linear(D, D, rngs=rngs)
        self.other.kernel = self.linear.kernel

    def __call__(self, x):
        return self.other(jnp.tanh(self.linear(x)))


@pytest.mark.parametrize(
    "form, message",
    [(Widths, "linear is called on arrays of different forms"), (StackTwice, "the same run of a")],
)
def test_calls_that_cannot_be_put_together_are_refused(form, message):
    model, batch = form(nnx.Rngs(0)), data()
    problem = jhessians.Problem(squares, model, jhessians.find_sites(squares, model, batch))
    with pytest.raises(ValueError, match=message):
        accumulated(SecondMoment(), problem, batch)
    accumulated(Covariance(), problem, batch)  # sums over positions have no such trouble


def test_more_or_fewer_calls_than_sites_know_of_are_refused():
    batch = data()
    two, three, one = (Loop(nnx.Linear, nnx.Rngs(0), times=times) for times in (2, 3, 1))
    sites = jhessians.find_sites(squares, two, batch)
    for model, message in ((three, "more often than the 2 times"), (one, "called 1 times here")):
        problem = jhessians.Problem(squares, model, sites)
        with pytest.raises(ValueError, match=message):
            accumulated(SecondMoment(), problem, batch)


def test_a_shared_kernel_with_two_biases_counts_without_them_only():
    model, batch = small.fill(lambda: OwnBiases(nnx.Rngs(0))), data()
    with pytest.raises(ValueError, match="share the weight linear have biases of their own"):
        jhessians.find_sites(squares, model, batch, include_bias=True)
    problem = jhessians.Problem(squares, model, jhessians.find_sites(squares, model, batch))
    found = accumulated(SecondMoment(), problem, batch)["linear"]["weight"]
    documents = gradients.of_documents(squares, model, batch)
    expected = sum(np.square(gradients.matrix(each, "linear")) for each in documents)
    assert relative_error(found, expected) < FACTORS


def test_a_mask_of_other_positions_is_refused():
    class Pooled(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x):
            return self.linear(x.mean(1))[:, None]

    model, batch = Pooled(nnx.Rngs(0)), data()
    sites = jhessians.find_sites(squares, model, batch)
    mask = np.ones((N, S), bool)
    problem = jhessians.Problem(squares, model, sites, mask=lambda batch: mask)
    with pytest.raises(ValueError, match="linear reads 1 positions of 4 documents where the mask"):
        accumulated(Covariance(), problem, batch)
    # Without a mask, the mean over positions counts as a document's only position.
    found = accumulated(Covariance(), replace(problem, mask=lambda batch: None), batch)
    means = batch[0].astype(np.float64).mean(1)
    assert relative_error(unpack(found["linear"]["activation"], D), means.T @ means) < FACTORS
