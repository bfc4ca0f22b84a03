"""A and S against float64 numpy: masks, biases, shared inputs, packed and plain dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.folds.covariance import Covariance
from jhessians.linalg.symmetric import unpack
from tests.oracles import kfac_numpy
from tests.small import relative_error
from tests.tolerances import FACTORS


def make(n, s, i, o, *, seed=0):
    random = np.random.default_rng(seed)
    a, g = random.standard_normal((n, s, i)), random.standard_normal((n, s, o))
    mask = random.random((n, s)) < 0.6
    mask[0] = False  # a document of which nothing counts
    return a.astype(np.float32), g.astype(np.float32), mask


def site(i, o, *, ones=False, name="linear", input_site="linear"):
    return Site(name, i, o, use_bias=ones, ones=ones, input_site=input_site)


def term(fold, where, a, g, mask):
    context = Context(mask=None if mask is None else jnp.asarray(mask))
    return fold.term(where, jnp.asarray(a), jnp.asarray(g), {}, context)


def oracle(a, g, mask, ones):
    documents = list(zip(a, g, strict=True))
    documents = kfac_numpy.with_bias(documents) if ones else documents
    masks = np.ones(a.shape[:2], bool) if mask is None else mask
    return kfac_numpy.covariances(documents, list(masks))[:2]


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("i", "o"), [(5, 7), (7, 5), (1, 1), (600, 513), (511, 3)])
def test_sums_of_outer_products(i, o, ones, with_mask):
    a, g, mask = make(3, 11, i, o)
    mask = mask if with_mask else None
    result = term(Covariance(), site(i, o, ones=ones), a, g, mask)
    expected = oracle(a, g, mask, ones)
    for kind, d, matrix in zip(("activation", "gradient"), (i + ones, o), expected, strict=True):
        assert relative_error(unpack(result[kind], d), matrix) < FACTORS / 3


def test_the_shapes_are_those_announced():
    a, g, mask = make(2, 4, 511, 520)
    for where in (site(511, 520, ones=True), site(511, 520), site(511, 520, name="key")):
        announced = Covariance().shapes(where)
        result = term(Covariance(), where, a, g, mask)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), result) == jax.tree.map(
            lambda x: (x.shape, x.dtype), announced
        )


def test_rows_are_padded_for_the_devices():
    a, g, _ = make(2, 4, 6, 520)
    where = site(6, 520)
    context = Context(axes=("devices",), shards=7)
    result = Covariance().term(where, jnp.asarray(a), jnp.asarray(g), {}, context)
    assert [x.shape[0] % 7 for x in jax.tree.leaves(result)] == [0] * 4
    np.testing.assert_array_equal(
        unpack(result["gradient"], 520),
        unpack(term(Covariance(), where, a, g, None)["gradient"], 520),
    )


def test_a_shared_input_is_kept_once():
    a, g, mask = make(2, 4, 5, 7)
    result = term(Covariance(), site(5, 7, name="key", input_site="query"), a, g, mask)
    assert set(result) == set(Covariance().shapes(site(5, 7, name="key"))) == {"gradient"}


def test_half_precision_is_summed_in_single():
    a, g, mask = make(4, 400, 6, 5)
    a, g = jnp.asarray(a, jnp.bfloat16), jnp.asarray(g, jnp.bfloat16)
    result = term(Covariance(), site(6, 5), a, g, mask)
    assert result["activation"][0].dtype == jnp.float32
    expected = oracle(np.asarray(a, np.float64), np.asarray(g, np.float64), mask, False)
    assert relative_error(unpack(result["activation"], 6), expected[0]) < FACTORS
    assert relative_error(unpack(result["gradient"], 5), expected[1]) < FACTORS


def test_double_precision_is_double():
    a, g, mask = make(4, 50, 6, 5)
    expected = oracle(a, g, mask, False)
    with jax.enable_x64(True):
        result = term(Covariance(jnp.float64), site(6, 5), a, g, mask)
        assert relative_error(unpack(result["activation"], 6), expected[0]) < 1e-14
        assert relative_error(unpack(result["gradient"], 5), expected[1]) < 1e-14


def test_what_is_masked_may_be_any_finite_number():
    a, g, mask = make(2, 6, 5, 7)
    expected = term(Covariance(), site(5, 7, ones=True), a, g, mask)
    a[~mask] = 1e38
    g[~mask] = -1e38
    result = term(Covariance(), site(5, 7, ones=True), a, g, mask)
    jax.tree.map(np.testing.assert_array_equal, result, expected)
