"""Label draws against the exact Gauss-Newton factor, which a small model lets us compute."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jhessians import Covariance, NextTokenLoss, Problem, accumulate, find_sites, initialize
from jhessians.data.batching import Batch
from tests.small import decoder

SITE = "layers.{layer}.mlp.down"  # the last thing added to what norm and head read


def batch_of(tokens: np.ndarray, first_document: int = 0) -> Batch:
    n, s = tokens.shape
    mask = np.broadcast_to(np.arange(s) + 1 < s, (n, s)).copy()
    return Batch(tokens, tokens, mask, first_document + np.arange(n, dtype=np.int32))


@pytest.fixture(scope="module")
def model():
    return decoder()


@pytest.fixture(scope="module")
def tokens(model):
    size = (6, 10)
    return np.random.default_rng(0).integers(0, model.config.vocabulary_size, size, np.int32)


@pytest.fixture(scope="module")
def exact(model, tokens):
    """Σ J (diag p - p pᵀ) Jᵀ over positions, J the Jacobian of logits at the last block's output.

    That is E[g gᵀ] of the last linear under the model's own labels: its gradient at a position
    comes from that position's loss alone.
    """
    layers = model.layers
    captured = []

    def through(self, *arguments, **options):
        captured.append(type(layers).__call__(layers, *arguments, **options))
        return captured[-1]

    class Listening:
        __call__ = through
        tape = None

    model.layers = Listening()
    try:
        model.hidden(jnp.asarray(tokens))
    finally:
        model.layers = layers
    (hidden,) = captured
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    head = lambda h: model.logits(model.final_norm(h[None]))[0]  # noqa: E731
    logits = np.asarray(jax.vmap(head)(rows), np.float64)
    jacobians = np.asarray(jax.vmap(jax.jacobian(head))(rows), np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    curvature = p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]
    return np.einsum("tvd,tvw,twe->de", jacobians, curvature, jacobians)


@pytest.fixture(scope="module")
def factor_by_draws(model, tokens):
    """By number of draws, a function of the first document's number, which decides them."""
    fold = Covariance()
    sites = find_sites(NextTokenLoss(), model, batch_of(tokens))
    problem = Problem(NextTokenLoss(), model, sites)
    zeros = initialize(fold, problem)

    @functools.cache
    def factor(draws):
        drawn = replace(problem, loss=NextTokenLoss(draws=draws), draws=draws)
        step = jax.jit(lambda batch: accumulate(fold, drawn, batch, zeros)[0])
        return lambda first: step(batch_of(tokens, first))[SITE]

    return factor


def test_error_to_the_exact_factor_falls_with_the_root_of_draws(model, factor_by_draws, exact):
    last = model.config.layers - 1
    errors = {}
    for draws in (1, 4, 16):
        factor = factor_by_draws(draws)
        found = [np.asarray(factor(1000 * k)["gradient"][0][last], np.float64) for k in range(16)]
        errors[draws] = np.sqrt(np.mean([np.linalg.norm(s - exact) ** 2 for s in found]))
        # Unbiased: the mean of all is nearer than any one by the root of their number.
        assert np.linalg.norm(np.mean(found, 0) - exact) < 3 * errors[draws] / np.sqrt(len(found))
    assert errors[1] / errors[4] == pytest.approx(2, rel=0.3)
    assert errors[4] / errors[16] == pytest.approx(2, rel=0.3)


def test_activations_do_not_move_with_the_number_of_draws(factor_by_draws):
    one, four = (factor_by_draws(k)(0)["activation"][0] for k in (1, 4))
    np.testing.assert_allclose(np.asarray(four), np.asarray(one), rtol=1e-5, atol=1e-6)


def test_a_loss_with_other_draws_than_said_is_refused(model, tokens):
    loss, batch = NextTokenLoss(draws=3), batch_of(tokens)
    problem = Problem(loss, model, find_sites(loss, model, batch))
    zeros = initialize(Covariance(), problem)

    def trace(batch):
        return accumulate(Covariance(), problem, batch, zeros)

    with pytest.raises(ValueError, match="expected 1 losses"):
        jax.eval_shape(trace, batch)
