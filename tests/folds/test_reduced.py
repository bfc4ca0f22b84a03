"""KFAC's reduced factors against numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import jhessians
from jhessians.capture.problem import Problem
from jhessians.fitting.factors import Matrix
from jhessians.folds.reduced import ReducedCovariance
from jhessians.methods.kfac_reduce import KFAC_REDUCE
from tests import small
from tests.small import relative_error
from tests.tolerances import FACTORS, INVARIANCE

LENGTHS = [9, 5, 2, 1, 12, 7, 3]


@pytest.fixture(scope="module")
def seen():
    """A decoder, its data, and what its linears saw: (a, g) of every document."""
    model = small.decoder(layers=2)
    data = small.documents(LENGTHS)
    return model, data


def reduced(problem, batches):
    sums = jhessians.run_pass(ReducedCovariance(), problem, batches)
    return {
        (module, side): Matrix(
            problem.sites[site.input_site] if side == "activation" else site, side, slot
        ).read(sums)
        for site in problem.sites.values()
        for slot, module in zip(site.slots, site.module_names(), strict=True)
        for side in ("activation", "gradient")
    }


def test_against_documents_one_by_one(seen):
    """KFAC of a document alone gives its Σ aaᵀ; that of means and sums is told apart by numpy."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, 6, 5)).astype(np.float32)
    g = rng.standard_normal((4, 6, 3)).astype(np.float32)
    mask = np.arange(6)[None] < np.array([6, 3, 1, 0])[:, None]
    from jhessians.capture.fold import Context
    from jhessians.capture.site import Site
    from jhessians.linalg.symmetric import unpack

    site = Site("x", 5, 3, True, ones=True, input_site="x")
    term = ReducedCovariance().term(
        site, jnp.asarray(a), jnp.asarray(g), {}, Context(mask=jnp.asarray(mask))
    )
    wide = np.concatenate([a, np.ones((4, 6, 1))], -1).astype(np.float64) * mask[..., None]
    means = wide.sum(1) / np.maximum(mask.sum(1), 1)[:, None]
    sums = (g.astype(np.float64) * mask[..., None]).sum(1)
    assert relative_error(unpack(term["activation"], 6), means.T @ means) < FACTORS
    assert relative_error(unpack(term["gradient"], 3), sums.T @ sums) < FACTORS
    # A wrong twin: positions' own products, as KFAC sums them.
    expanded = np.einsum("nsi,nsj->ij", wide, wide)
    assert relative_error(unpack(term["activation"], 6), expanded) > 0.1


@pytest.mark.parametrize("devices", [1, 7])
def test_batch_and_mesh_do_not_matter(seen, devices):
    model, data = seen
    loss = jhessians.NextTokenLoss("dataset")
    one = small.batches(data)
    sites = jhessians.find_sites(loss, model, one[0])
    expected = reduced(Problem(loss, model, sites), one)
    mesh = jhessians.make_mesh(devices) if devices > 1 else None
    many = small.batches(data, token_batch_size=16, max_shapes=3, devices=devices)
    found = reduced(Problem(loss, model, sites, mesh=mesh), many)
    for key, value in expected.items():
        assert relative_error(found[key], value) < INVARIANCE, key


def test_where_a_document_has_one_position_it_is_kfac(seen):
    model, _ = seen
    data = small.documents([2, 2, 2, 2, 2])
    loss = jhessians.NextTokenLoss("dataset")
    batches = small.batches(data)
    problem = Problem(loss, model, jhessians.find_sites(loss, model, batches[0]))
    counts = {"positions": 5, "documents": 5}
    kfac = jhessians.fit(problem, batches, **counts)
    same = jhessians.fit(problem, batches, **counts, method=KFAC_REDUCE.fold(None, np.float32))
    for kind in ("activation_covariance", "gradient_covariance", "eigenvalue"):
        for name, value in kfac[kind].items():
            assert relative_error(same[kind][name], value) < INVARIANCE, (kind, name)
