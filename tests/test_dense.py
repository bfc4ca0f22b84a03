"""Every factored method on a two-layer network whose full curvature matrix fits in memory.

The oracle runs the network and its backward pass by hand in float64 numpy, builds the Fisher matrix
of each layer, [O·I', O·I'], from whole documents' gradients, and takes the Kronecker factors from
that matrix by their definitions: partial traces, and the diagonal in an eigenbasis.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jhessians import Covariance, Linear, Problem, find_sites, fit
from jhessians.folds.shampoo import Shampoo
from jhessians.folds.tkfac import TKFAC
from tests.small import relative_error
from tests.tolerances import FACTORS

IN, HIDDEN, OUT = 5, 7, 4


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = Linear(IN, HIDDEN, rngs=rngs)
        self.second = Linear(HIDDEN, OUT, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Data(NamedTuple):
    inputs: np.ndarray
    targets: np.ndarray


def loss(network, data):
    return 0.5 * jnp.sum(jnp.square(network(data.inputs) - data.targets))


def by_hand(network, data):
    """Layer → (a [n, s, I], g [n, s, O]) of the squared error, in float64."""
    w1, b1, w2, b2 = (
        np.asarray(x, np.float64)
        for layer in (network.first, network.second)
        for x in (layer.kernel[...], layer.bias[...])
    )
    x, y = (np.asarray(v, np.float64) for v in data)
    hidden = np.tanh(x @ w1 + b1)
    residual = hidden @ w2 + b2 - y
    return {
        "first": (x, residual @ w2.T * (1 - hidden**2)),
        "second": (hidden, residual),
    }


def full_matrix(a, g, bias):
    """Σ_n vec(G_n) vec(G_n)ᵀ as [O, I', O, I']."""
    if bias:
        a = np.concatenate([a, np.ones((*a.shape[:2], 1))], axis=-1)
    gradients = np.einsum("nso,nsi->noi", g, a)
    return np.einsum("noi,npj->oipj", gradients, gradients)


@pytest.fixture(params=[1, 6], ids=["one position", "six positions"])
def data(request):
    random = np.random.default_rng(0)
    shape = (9, request.param)
    return Data(
        random.standard_normal((*shape, IN)).astype(np.float32),
        random.standard_normal((*shape, OUT)).astype(np.float32),
    )


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("method", [Covariance(), TKFAC(), Shampoo()], ids=type)
def test_factors_follow_from_the_full_matrix(method, bias, data):
    network = Network(nnx.Rngs(0))
    n, s = data.inputs.shape[:2]
    sites = find_sites(loss, network, data, include_bias=bias)
    problem = Problem(loss, network, sites)
    factors = fit(problem, [data], positions=n * s, documents=n, method=method)

    for layer, (a, g) in by_hand(network, data).items():
        fisher = full_matrix(a, g, bias)
        by_input = np.einsum("oioj->ij", fisher)
        by_output = np.einsum("oipi->op", fisher)
        trace = np.trace(by_input)
        found_a = factors["activation_covariance"][layer]
        found_s = factors["gradient_covariance"][layer]
        if isinstance(method, Shampoo):
            assert relative_error(found_a, by_input / trace) < FACTORS
            assert relative_error(found_s, by_output) < FACTORS
        elif isinstance(method, TKFAC) and s == 1:
            # With a position each, a document's matrix is one Kronecker product.
            assert relative_error(found_a, by_input) < FACTORS
            assert relative_error(found_s, by_output) < FACTORS
        elif isinstance(method, Covariance) and s == 1:
            # KFAC replaces the mean of products by the product of means.
            assert np.trace(found_a) > 0 and np.trace(found_s) > 0
            ones = np.ones((*a.shape[:2], 1)) if bias else np.ones((*a.shape[:2], 0))
            a = np.concatenate([a, ones], axis=-1)[:, 0]
            assert relative_error(found_a, a.T @ a) < FACTORS
            assert relative_error(found_s, g[:, 0].T @ g[:, 0]) < FACTORS

        # The correction is the diagonal of the full matrix in whatever basis the method found.
        q_a = factors["activation_eigenvectors"][layer].astype(np.float64)
        q_s = factors["gradient_eigenvectors"][layer].astype(np.float64)
        rotated = np.einsum("oipj,ok,il,pk,jl->kl", fisher, q_s, q_a, q_s, q_a, optimize=True)
        assert relative_error(factors["eigenvalue_correction"][layer], rotated / n) < FACTORS
        # In no other basis of Kronecker form is the diagonal nearer in trace: it is exact there.
        assert factors["eigenvalue_correction"][layer].sum() * n == pytest.approx(trace, rel=1e-5)


@pytest.mark.parametrize("data", [6], indirect=True)
def test_a_wrong_method_is_told_apart(data):
    """Each method's factors fail another's definition (at one position, TKFAC is Shampoo)."""
    network = Network(nnx.Rngs(0))
    n, s = data.inputs.shape[:2]
    problem = Problem(loss, network, find_sites(loss, network, data))
    found = [
        fit(problem, [data], positions=n * s, documents=n, method=method,
            correct_eigenvalues=False)["activation_covariance"]["second"]
        for method in (Covariance(), TKFAC(), Shampoo())
    ]  # fmt: skip
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert relative_error(one / np.trace(one), other / np.trace(other)) > 100 * FACTORS
