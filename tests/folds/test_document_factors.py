"""TKFAC and Shampoo against float64 numpy, both orders of Shampoo's products, and the trace."""

import jax.numpy as jnp
import numpy as np
import pytest

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.folds.shampoo import Shampoo
from jhessians.folds.tkfac import TKFAC
from jhessians.linalg.symmetric import packed_trace, unpack
from tests.small import relative_error
from tests.tolerances import FACTORS

SHAPES = [(5, 7, 11), (30, 20, 6), (6, 20, 11), (20, 6, 11), (520, 8, 12)]  # I, O, S


def documents(i, o, s, *, n=4, seed=0):
    random = np.random.default_rng(seed)
    a, g = random.standard_normal((n, s, i)), random.standard_normal((n, s, o))
    mask = random.random((n, s)) < 0.7
    mask[1] = False  # a document of which nothing counts
    return a.astype(np.float32), g.astype(np.float32), mask


def factors(fold, i, o, a, g, mask, *, ones=False):
    site = Site("linear", i, o, use_bias=ones, ones=ones, input_site="linear")
    context = Context(mask=jnp.asarray(mask))
    statistics = {"linear": fold.term(site, jnp.asarray(a), jnp.asarray(g), {}, context)}
    finished = fold.finish({"linear": site}, statistics)["linear"]
    return unpack(finished["activation"], i + ones), unpack(finished["gradient"], o)


def by_document(a, g, mask, ones):
    """(a, g) of each document in float64, only the positions that count."""
    for a_si, g_so, counts in zip(a.astype(np.float64), g.astype(np.float64), mask, strict=True):
        if ones:
            a_si = np.concatenate([a_si, np.ones((len(a_si), 1))], axis=1)
        yield a_si[counts], g_so[counts]


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("i", "o", "s"), SHAPES)
def test_tkfac(i, o, s, ones):
    a, g, mask = documents(i, o, s)
    expected_a = expected_s = 0
    for a_si, g_so in by_document(a, g, mask, ones):
        covariance_a, covariance_s = a_si.T @ a_si, g_so.T @ g_so
        expected_a = expected_a + np.trace(covariance_s) * covariance_a
        expected_s = expected_s + np.trace(covariance_a) * covariance_s
    found_a, found_s = factors(TKFAC(), i, o, a, g, mask, ones=ones)
    assert relative_error(found_a, expected_a) < FACTORS
    assert relative_error(found_s, expected_s) < FACTORS


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("i", "o", "s"), SHAPES)
def test_shampoo(i, o, s, ones):
    a, g, mask = documents(i, o, s)
    expected_a = expected_s = 0
    for a_si, g_so in by_document(a, g, mask, ones):
        gradient = g_so.T @ a_si
        expected_a = expected_a + gradient.T @ gradient
        expected_s = expected_s + gradient @ gradient.T
    found_a, found_s = factors(Shampoo(), i, o, a, g, mask, ones=ones)
    assert relative_error(found_a, expected_a / np.trace(expected_a)) < FACTORS
    assert relative_error(found_s, expected_s) < FACTORS


def test_the_papers_trace_restriction():
    """With the trace divided out, the trace of A ⊗ S is that of the sum of A_n ⊗ S_n."""
    a, g, mask = documents(5, 7, 11)
    found_a, found_s = factors(TKFAC(normalize=True), 5, 7, a, g, mask)
    exact = sum(
        np.trace(x.T @ x) * np.trace(y.T @ y) for x, y in by_document(a, g, mask, ones=False)
    )
    assert np.trace(found_a) * np.trace(found_s) == pytest.approx(exact, rel=FACTORS)
    plain_a, _ = factors(TKFAC(), 5, 7, a, g, mask)
    assert np.trace(plain_a) == pytest.approx(exact, rel=FACTORS)


def test_a_module_that_saw_nothing_has_zero_factors():
    a, g, mask = documents(5, 7, 11)
    for found in factors(Shampoo(), 5, 7, a, g, np.zeros_like(mask)):
        assert not found.any()


def test_documents_are_units_however_they_are_batched():
    a, g, mask = documents(6, 9, 10)
    site = Site("linear", 6, 9, use_bias=False, input_site="linear")
    for fold in (TKFAC(), Shampoo()):
        terms = [
            fold.term(site, jnp.asarray(a[k : k + 1]), jnp.asarray(g[k : k + 1]), {},
                      Context(mask=jnp.asarray(mask[k : k + 1])))
            for k in range(len(a))
        ]  # fmt: skip
        whole = fold.term(site, jnp.asarray(a), jnp.asarray(g), {}, Context(mask=jnp.asarray(mask)))
        for kind, d in (("activation", 6), ("gradient", 9)):
            total = sum(unpack(term[kind], d) for term in terms)
            assert relative_error(unpack(whole[kind], d), total) < FACTORS


@pytest.mark.parametrize("d", [7, 600])
def test_trace_of_packed_blocks(d):
    from jhessians.linalg.symmetric import packed_gram

    x = np.random.default_rng(0).standard_normal((9, d)).astype(np.float32)
    found = packed_trace(packed_gram(jnp.asarray(x), multiple=7), d)
    assert float(found) == pytest.approx(np.square(x, dtype=np.float64).sum(), rel=1e-6)
