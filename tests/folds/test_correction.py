"""Λ against float64 numpy in every order of the products that the fold chooses between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.folds.correction import EigenvalueCorrection
from tests.oracles import kfac_numpy
from tests.small import relative_error
from tests.tolerances import FACTORS


def make(n, s, i, o, ones, *, seed=0):
    random = np.random.default_rng(seed)

    def basis(d):
        return np.linalg.qr(random.standard_normal((d, d)))[0].astype(np.float32)

    a = random.standard_normal((n, s, i)).astype(np.float32)
    g = random.standard_normal((n, s, o)).astype(np.float32)
    mask = random.random((n, s)) < 0.7
    return a, g, mask, basis(i + ones), basis(o)


def term(fold, where, a, g, mask, q_a, q_s, shards=1):
    context = Context(mask=None if mask is None else jnp.asarray(mask), shards=shards)
    operands = {"activation": jnp.asarray(q_a), "gradient": jnp.asarray(q_s)}
    return fold.term(where, jnp.asarray(a), jnp.asarray(g), operands, context)


def oracle(a, g, mask, q_a, q_s, ones):
    if mask is not None:
        g = np.where(mask[..., None], g, 0)
    documents = list(zip(a, g, strict=True))
    documents = kfac_numpy.with_bias(documents) if ones else documents
    q_a, q_s = q_a.astype(np.float64), q_s.astype(np.float64)
    return kfac_numpy.eigenvalue_correction(documents, q_s, q_a, n_docs=1)


# S < O and S >= O, S < I and S >= I, and equality.
SIZES = [(3, 5, 7), (6, 5, 7), (6, 7, 5), (9, 5, 7), (7, 5, 7), (5, 5, 7), (1, 1, 1), (4, 520, 513)]


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("s", "i", "o"), SIZES)
def test_squares_of_rotated_document_gradients(s, i, o, ones, with_mask):
    a, g, mask, q_a, q_s = make(4, s, i, o, ones)
    mask = mask if with_mask else None
    where = Site("linear", i, o, use_bias=ones, ones=ones, input_site="linear")
    result = term(EigenvalueCorrection(), where, a, g, mask, q_a, q_s)
    announced = EigenvalueCorrection().shapes(where)
    assert (result.shape, result.dtype) == (announced.shape, announced.dtype)
    assert relative_error(result, oracle(a, g, mask, q_a, q_s, ones)) < FACTORS / 3


@pytest.mark.parametrize(("s", "i", "o"), SIZES[:-1])
def test_rotates_first_what_is_less_arithmetic(s, i, o):
    a, g, _, q_a, q_s = make(2, s, i, o, False)
    where = Site("linear", i, o, use_bias=False, input_site="linear")
    jaxpr = jax.make_jaxpr(
        lambda *args: term(EigenvalueCorrection(), where, *args[:2], None, *args[2:])
    )(a, g, q_a, q_s)
    before_the_scan = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    rotated = [e.invars[0].aval.shape[-1] for e in before_the_scan]
    assert rotated == [i] * (s <= o) + [o] * (s <= i)


def test_padding_rows_of_the_bases_are_ignored():
    a, g, mask, q_a, q_s = make(3, 4, 5, 7, False)
    where = Site("linear", 5, 7, use_bias=False, input_site="linear")
    padded = [np.pad(q, ((0, 3), (0, 0)), constant_values=np.nan) for q in (q_a, q_s)]
    result = term(EigenvalueCorrection(), where, a, g, mask, *padded, shards=8)
    assert relative_error(result, oracle(a, g, mask, q_a, q_s, False)) < FACTORS / 3


def test_double_precision_is_double():
    a, g, mask, q_a, q_s = make(3, 4, 5, 7, False)
    where = Site("linear", 5, 7, use_bias=False, input_site="linear")
    with jax.enable_x64(True):
        q_a, q_s = q_a.astype(np.float64), q_s.astype(np.float64)
        result = term(EigenvalueCorrection(jnp.float64), where, a, g, mask, q_a, q_s)
        assert relative_error(result, oracle(a, g, mask, q_a, q_s, False)) < 1e-13


def test_positions_of_a_document_are_summed_before_they_are_squared():
    a, g, _, q_a, q_s = make(2, 4, 5, 7, False)
    where = Site("linear", 5, 7, use_bias=False, input_site="linear")
    together = term(EigenvalueCorrection(), where, a, g, None, q_a, q_s)
    apart = term(
        EigenvalueCorrection(), where, a.reshape(8, 1, 5), g.reshape(8, 1, 7), None, q_a, q_s
    )
    assert relative_error(apart, together) > 0.1
