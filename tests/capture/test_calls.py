"""A weight that one pass uses several times: a document's gradient is the sum over all uses."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.capture.fold import Context
from jhessians.folds.covariance import Covariance
from jhessians.folds.gram import Gram, JointGram
from jhessians.folds.reduced import ReducedCovariance
from jhessians.folds.rows import GradientRows
from jhessians.folds.second_moment import SecondMoment
from jhessians.folds.shampoo import Shampoo
from jhessians.folds.tkfac import TKFAC
from jhessians.linalg.projection import Projection
from jhessians.linalg.symmetric import unpack
from tests import small
from tests.capture import gradients
from tests.small import relative_error
from tests.tolerances import FACTORS, INVARIANCE, TWIN

N, S, D = 4, 3, 5


class Loop(nnx.Module):
    """One linear that a loop calls again and again."""

    def __init__(self, linear, rngs, times=2):
        self.linear = linear(D, D, rngs=rngs)
        self.times = times

    def __call__(self, x):
        for _ in range(self.times):
            x = jnp.tanh(self.linear(x))
        return x


class TwoNames(nnx.Module):
    """One linear that is held twice."""

    def __init__(self, linear, rngs):
        self.linear = linear(D, D, rngs=rngs)
        self.other = self.linear

    def __call__(self, x):
        return self.other(jnp.tanh(self.linear(x)))


class TiedWeights(nnx.Module):
    """Two linears that hold one kernel and one bias."""

    def __init__(self, linear, rngs):
        self.linear = linear(D, D, rngs=rngs)
        self.other = linear(D, D, rngs=rngs)
        self.other.kernel, self.other.bias = self.linear.kernel, self.linear.bias

    def __call__(self, x):
        return self.other(jnp.tanh(self.linear(x)))


class InLayers(nnx.Module):
    """A stack whose blocks call their linear twice."""

    def __init__(self, linear, rngs):
        self.linear = jhessians.Stack(lambda r: Loop(linear, r), 2, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def squares(model, batch):
    x, y = batch
    return jnp.sum(jnp.square(model(x) - y))


def data():
    x, y = np.random.default_rng(0).standard_normal((2, N, S, D)).astype(np.float32)
    return x, y


def accumulated(fold, problem, batch, operands=None):
    zeros = jhessians.initialize(fold, problem)
    return jhessians.accumulate(fold, problem, batch, zeros, operands=operands)[0]


@pytest.mark.parametrize("devices", [None, 2])
@pytest.mark.parametrize("linear", [nnx.Linear, jhessians.Linear])
@pytest.mark.parametrize("form", [Loop, TwoNames, TiedWeights, InLayers])
def test_documents_gradients_are_sums_over_calls(form, linear, devices):
    model, batch = small.fill(lambda: form(linear, nnx.Rngs(0))), data()
    sites = jhessians.find_sites(squares, model, batch, include_bias=True)
    (site,) = sites.values()
    assert site.calls == 2 and sites.coverage.share == 1
    mesh = None if devices is None else jhessians.make_mesh(devices)
    problem = jhessians.Problem(squares, model, sites, mesh=mesh)
    found = accumulated(SecondMoment(), problem, batch)[site.name]

    documents = gradients.of_documents(squares, model, batch)
    if form is InLayers:
        assert site.members == (0, 1)
        own = [each["linear"]["blocks"]["linear"] for each in documents]
        weight = sum(np.square(np.asarray(each["kernel"]).swapaxes(1, 2)) for each in own)
        bias = sum(np.square(np.asarray(each["bias"])) for each in own)
    else:
        pairs = [np.square(gradients.matrix(each, "linear", bias=True)) for each in documents]
        weight, bias = sum(pairs)[:, :D], sum(pairs)[:, D]
    assert relative_error(np.asarray(found["weight"])[..., :D, :], weight) < FACTORS
    assert relative_error(np.asarray(found["bias"])[..., :D], bias) < FACTORS


# Every fold by hand, on the linear of `Loop` without a bias.


def calls_by_hand(model, batch):
    """(a, g) of both calls in float64, by the chain rule."""
    w = np.asarray(model.linear.kernel[...], np.float64)
    x, y = (each.astype(np.float64) for each in batch)
    hidden = np.tanh(x @ w)
    out = np.tanh(hidden @ w)
    g_out = 2 * (out - y) * (1 - out**2)
    return [(x, (g_out @ w.T) * (1 - hidden**2)), (hidden, g_out)]


def per_document(calls, mask):
    """G_n [n, out, in] of each document, and of each of its positions [n, s, out, in]."""
    tokens = sum(np.einsum("ns,nso,nsi->nsoi", mask, g, a) for a, g in calls)
    return tokens.sum(1), tokens


@dataclass(frozen=True)
class Rows:
    """A joint fold of a user's own: documents' gradients as rows, and their Gram."""

    joint = "rows"

    def shapes(self):
        return jax.ShapeDtypeStruct((D * D, D * D), jnp.float32)

    def row_shapes(self, documents, positions):
        return jax.ShapeDtypeStruct((documents, D * D), jnp.float32)

    def term(self, site, a, g, operands, context):
        g = jnp.where(context.mask[..., None], g, 0)
        return jnp.einsum("nso,nsi->noi", g, a).reshape(len(a), -1)

    def finish_rows(self, rows):
        return rows.T @ rows


Q_A, Q_S = (np.linalg.qr(each)[0] for each in np.random.default_rng(5).standard_normal((2, D, D)))


def grams(rows):
    flat = rows.reshape(-1, D * D)
    return flat.T @ flat


def covariance_pair(calls, mask):
    """Sums of a aᵀ and of g gᵀ over documents, positions and calls."""
    return tuple(
        sum(np.einsum("ns,nsi,nsj->ij", mask, x, x) for x in side)
        for side in zip(*calls, strict=True)
    )


def trace_pair(calls, mask):
    """TKFAC's sums, each document's covariances over the positions of both calls."""
    a, g = (
        sum(np.einsum("ns,nsi,nsj->nij", mask, x, x) for x in side)
        for side in zip(*calls, strict=True)
    )
    trace = lambda x: np.trace(x, axis1=1, axis2=2)[:, None, None]  # noqa: E731
    return (a * trace(g)).sum(0), (g * trace(a)).sum(0)


def reduced_pair(calls, mask):
    """Each document's mean input and its summed gradient, over the positions of both calls."""
    a, g = (sum(np.einsum("ns,nsi->ni", mask, x) for x in side) for side in
            zip(*calls, strict=True))  # fmt: skip
    a /= np.maximum(len(calls) * mask.sum(1), 1)[:, None]
    return a.T @ a, g.T @ g


FOLDS = {
    "correction": (
        jhessians.EigenvalueCorrection(),
        lambda calls, mask: np.square(Q_S.T @ per_document(calls, mask)[0] @ Q_A).sum(0),
    ),
    "shampoo": (
        Shampoo(),
        lambda calls, mask: (
            np.einsum("noi,noj->ij", *[per_document(calls, mask)[0]] * 2),
            np.einsum("noi,npi->op", *[per_document(calls, mask)[0]] * 2),
        ),
    ),
    "tkfac": (TKFAC(), trace_pair),
    "covariance": (Covariance(), covariance_pair),
    "reduced": (ReducedCovariance(), reduced_pair),
    "second moment": (
        SecondMoment(),
        lambda calls, mask: np.square(per_document(calls, mask)[0]).sum(0),
    ),
    "gram": (Gram(GradientRows()), lambda calls, mask: grams(per_document(calls, mask)[0])),
    "gram of tokens": (
        Gram(GradientRows(tokens=True)),
        lambda calls, mask: grams(per_document(calls, mask)[1]),
    ),
    "joint": (Rows(), lambda calls, mask: grams(per_document(calls, mask)[0])),
}


@pytest.mark.parametrize("kind", FOLDS)
def test_every_fold_sees_both_calls_of_a_linear(kind):
    fold, oracle = FOLDS[kind]

    def linear(inputs, outputs, *, rngs):
        return jhessians.Linear(inputs, outputs, use_bias=False, rngs=rngs)

    model, batch = small.fill(lambda: Loop(linear, nnx.Rngs(0))), data()
    mask = np.random.default_rng(1).random((N, S)) < 0.7
    sites = jhessians.find_sites(squares, model, batch)
    problem = jhessians.Problem(squares, model, sites, mask=lambda batch: mask)
    operands = {"linear": {"activation": Q_A.astype("f4"), "gradient": Q_S.astype("f4")}}
    found = accumulated(fold, problem, batch, operands if kind == "correction" else None)
    (found,) = found.values()
    if kind == "second moment":
        found = found["weight"]
    elif isinstance(found, dict):
        found = tuple(unpack(found[name], D) for name in ("activation", "gradient"))

    calls = calls_by_hand(model, batch)
    expected = oracle(calls, mask)
    # The wrong twin: the statistics of each call by itself, added.
    apart = [oracle([call], mask) for call in calls]
    if not isinstance(expected, tuple):
        found, expected, apart = (found,), (expected,), [(each,) for each in apart]
    for i, each in enumerate(expected):
        assert relative_error(found[i], each) < FACTORS
        error = relative_error(apart[0][i] + apart[1][i], each)
        assert error < FACTORS if kind == "covariance" else error > TWIN


@pytest.mark.parametrize("tokens", [False, True])
def test_projected_rows_of_calls_are_added(tokens):
    """A projection is linear: the rows of both calls are those of one plus those of the other."""
    site = jhessians.Site("linear", D, D, use_bias=False, input_site="linear")
    fold = JointGram(GradientRows(Projection(4), tokens=tokens))
    random = np.random.default_rng(0)
    a, g = random.standard_normal((2, 2, N, S, D)).astype(np.float32)
    operands = {"keys": jnp.asarray(fold.rows.global_keys(site, "linear"))}
    one, other = (
        fold.term(site, jnp.asarray(a[k]), jnp.asarray(g[k]), operands, Context()) for k in (0, 1)
    )
    together = fold.term(
        replace(site, calls=2),
        *(jnp.concatenate(list(each), axis=1) for each in (a, g)),
        operands,
        Context(),
    )
    assert relative_error(together, one + other) < INVARIANCE
