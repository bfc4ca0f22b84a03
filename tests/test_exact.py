"""Cases in which Kronecker factors are exact, after the tests of arXiv:2507.05127.

Through `jhessians.fit`, on chains of linears whose gradients are written out in float64 here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

import jhessians
from jhessians.models.loss import sample
from tests import small
from tests.oracles import kfac_numpy
from tests.small import relative_error
from tests.tolerances import FACTORS


class Chain(nnx.Module):
    """Linears with tanh, or with nothing, between them."""

    def __init__(self, sizes, nonlinear, rngs):
        self.linears = nnx.List(
            jhessians.Linear(i, o, name=f"linear{k}", rngs=rngs)
            for k, (i, o) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        )
        self.nonlinear = nonlinear

    def __call__(self, x):
        for k, linear in enumerate(self.linears):
            x = linear(jnp.tanh(x) if k and self.nonlinear else x)
        return x


class Batch(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    position_mask: np.ndarray


def chain(sizes, nonlinear=True, seed=0):
    return small.fill(lambda: Chain(sizes, nonlinear, nnx.Rngs(0)), seed)


def make_batch(n, s, sizes, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, s, sizes[0])).astype(np.float32)
    y = random.standard_normal((n, s, sizes[-1])).astype(np.float32)
    return Batch(x, y, np.ones((n, s), bool))


def squared_error(model, batch):
    return 0.5 * jnp.sum((model(batch.x) - batch.y) ** 2)


def along(model, batch):
    """The outputs' component along y, whose gradient at the outputs is y itself."""
    return jnp.sum(model(batch.x) * batch.y)


def fit(model, batch, loss=squared_error, *, include_bias=True, draws=1):
    sites = jhessians.find_sites(loss, model, batch, include_bias=include_bias)
    return jhessians.fit(
        jhessians.Problem(loss, model, sites, draws=draws), [batch],
        positions=int(batch.position_mask.sum()), documents=len(batch.x),
    )  # fmt: skip


def weights(linear):
    return (np.asarray(p[...], np.float64) for p in (linear.kernel, linear.bias))


def what_linears_see(model, batch, output_gradient):
    """(a with a last column of ones, g) of every linear, masked positions taken out of both."""
    inputs, x = [], batch.x.astype(np.float64)
    for k, linear in enumerate(model.linears):
        x = np.tanh(x) if k and model.nonlinear else x
        inputs.append(x)
        kernel, bias = weights(linear)
        x = x @ kernel + bias
    g = output_gradient(x)
    seen = []
    for k in reversed(range(len(inputs))):
        ones = np.ones((*inputs[k].shape[:-1], 1))
        a = np.concatenate([inputs[k], ones], axis=-1)
        seen.append([v * batch.position_mask[..., None] for v in (a, g)])
        kernel, _ = weights(model.linears[k])
        g = g @ kernel.T
        if model.nonlinear:
            g = g * (1 - inputs[k] ** 2)
    return seen[::-1]


def document_gradients(seen):
    a, g = seen
    return np.einsum("nso,nsi->noi", g, a)


def exact_fisher(seen):
    """Mean over documents of vec(G) vec(G)ᵀ."""
    a, g = seen
    return kfac_numpy.exact_layer_fisher(list(a), list(g)) / len(a)


def dense(factors, name, eigenvalues="eigenvalue"):
    kinds = ("gradient_eigenvectors", "activation_eigenvectors", eigenvalues)
    return kfac_numpy.kronecker_fisher(*(factors[kind][name].astype(np.float64) for kind in kinds))


SIZES = (4, 6, 5, 3)


@pytest.mark.parametrize("copies", [1, 5])
def test_one_datum_is_exact_for_any_model(copies):
    """G = g aᵀ, so vec(G) vec(G)ᵀ = ggᵀ ⊗ aaᵀ; copies of it change no mean."""
    model, one = chain(SIZES), make_batch(1, 1, SIZES)
    batch = Batch(*(np.repeat(x, copies, axis=0) for x in one))
    factors = fit(model, batch)
    for k, seen in enumerate(what_linears_see(model, batch, lambda z: z - batch.y)):
        exact = exact_fisher(seen)
        name = f"linear{k}"
        raw = np.kron(factors["gradient_covariance"][name],
                      factors["activation_covariance"][name]) / copies**2  # fmt: skip
        assert relative_error(raw, exact) < FACTORS
        assert relative_error(dense(factors, name), exact) < FACTORS
        assert relative_error(dense(factors, name, "eigenvalue_correction"), exact) < FACTORS


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("sizes", [(4, 3), (4, 6, 5, 3)])
def test_linear_networks_with_squared_error_are_exact(sizes, positions):
    """The Gauss-Newton matrix of squared error back-propagates every unit vector at every output.

    Behind a linear layer nothing depends on the data, so the expectation of the product is the
    product of the expectations: exact with any number of data, and with shared weights.
    """
    n, outputs = 7, sizes[-1]
    data = make_batch(n, positions, sizes)
    units = np.eye(positions * outputs, dtype=np.float32).reshape(-1, positions, outputs)
    x, y = np.repeat(data.x, len(units), axis=0), np.tile(units, (n, 1, 1))
    batch = Batch(x, y, np.ones(x.shape[:2], bool))
    model = chain(sizes, nonlinear=False)
    factors = fit(model, batch, along)
    for k, seen in enumerate(what_linears_see(model, batch, lambda z: batch.y)):
        exact = exact_fisher(seen)
        assert relative_error(dense(factors, f"linear{k}"), exact) < FACTORS

    # The same with tanh is not: the test tells a wrong factor from a right one.
    model = chain(sizes)
    if len(sizes) > 2:
        factors = fit(model, batch, along)
        seen = what_linears_see(model, batch, lambda z: batch.y)[0]
        assert relative_error(dense(factors, "linear0"), exact_fisher(seen)) > 1e-2


def test_the_correction_is_the_exact_diagonal_in_its_basis():
    """For any model, with masks and shared weights: hence the exact trace, and a better fit."""
    model, batch = chain(SIZES), make_batch(9, 4, SIZES)
    mask = np.random.default_rng(1).random((9, 4)) < 0.7
    batch = batch._replace(position_mask=mask)
    factors = fit(model, batch)
    for k, seen in enumerate(what_linears_see(model, batch, lambda z: z - batch.y)):
        name, exact = f"linear{k}", exact_fisher(seen)
        correction = factors["eigenvalue_correction"][name].astype(np.float64)
        squares = (document_gradients(seen) ** 2).sum()
        assert correction.sum() * len(batch.x) == pytest.approx(squares, rel=FACTORS)

        basis = np.kron(factors["gradient_eigenvectors"][name],
                        factors["activation_eigenvectors"][name]).astype(np.float64)  # fmt: skip
        diagonal = np.diag(basis.T @ exact @ basis)
        assert relative_error(correction.ravel(), diagonal) < FACTORS
        kfac, ekfac = (
            np.linalg.norm(dense(factors, name, kind) - exact)
            for kind in ("eigenvalue", "eigenvalue_correction")
        )
        assert ekfac < kfac


@pytest.mark.parametrize("sizes", [(1, 6, 1), (5, 1, 4)])
def test_dimensions_of_one(sizes):
    """A layer with one input has the basis ±1 and one eigenvalue, the mean square."""
    model, batch = chain(sizes), make_batch(6, 2, sizes)
    factors = fit(model, batch, include_bias=False)
    seen = what_linears_see(model, batch, lambda z: z - batch.y)
    for k, (a, g) in enumerate(seen):
        a = a[..., :-1]
        for kind, x in (("activation", a), ("gradient", g)):
            if x.shape[-1] == 1:
                assert abs(factors[f"{kind}_eigenvectors"][f"linear{k}"]) == pytest.approx(1)
                values = factors[f"{kind}_eigenvalues"][f"linear{k}"]
                assert values == pytest.approx(np.mean(x**2) * 2**0.5, rel=FACTORS)
        squares = (document_gradients((a, g)) ** 2).sum() / len(a)
        correction = factors["eigenvalue_correction"][f"linear{k}"]
        assert correction.sum() == pytest.approx(squares, rel=FACTORS)


DRAWS = 1024


def sampled_cross_entropy(model, batch):
    """One loss per draw, of labels from the model's own distribution."""
    n, s, outputs = batch.y.shape
    logits = model(batch.x).reshape(n * s, outputs)
    rows = jnp.arange(n * s, dtype=jnp.int32)

    def one(draw):
        labels = sample(jax.lax.stop_gradient(logits), rows, rows, 0, draw)
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen[:, 0])

    return jax.vmap(one)(jnp.arange(DRAWS))


def test_sampled_labels_give_the_gauss_newton_factor_in_expectation():
    """E ggᵀ = Jᵀ (diag p - ppᵀ) J, with J of the logits at the linear's output."""
    model, batch = chain((4, 6, 5)), make_batch(5, 1, (4, 6, 5))
    factors = fit(model, batch, sampled_cross_entropy, draws=DRAWS)
    expected = [0.0, 0.0]
    for x in batch.x[:, 0].astype(np.float64):
        kernel, bias = weights(model.linears[0])
        hidden = np.tanh(x @ kernel + bias)
        kernel, bias = weights(model.linears[1])
        p = scipy.special.softmax(hidden @ kernel + bias)
        middle = np.diag(p) - np.outer(p, p)
        jacobian = kernel.T * (1 - hidden**2)
        expected[0] += jacobian.T @ middle @ jacobian
        expected[1] += middle
    for k, exact in enumerate(expected):
        found = factors["gradient_covariance"][f"linear{k}"]
        # A mean of 1024 · 5 draws: 4 % is three standard errors.
        assert relative_error(found, exact) < 0.05
