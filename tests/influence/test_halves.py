"""Two halves' factors of a module, compared in numpy by dense matrices."""

import numpy as np
import pytest

from jhessians.errors import CheckpointError
from jhessians.influence.halves import compare
from jhessians.influence.inversion import Inverse
from jhessians.influence.scoring import as_hessian
from jhessians.influence.spectra import curvatures, dead_modules, factor_spectra

OUTPUTS, INPUTS, DOCUMENTS = 4, 6, 40


def fitted(seed, documents=DOCUMENTS):
    """EKFAC of random documents of 5 positions, from the formulas."""
    random = np.random.default_rng(seed)
    a = random.standard_normal((documents, 5, INPUTS)) * np.logspace(0, -1, INPUTS)
    g = random.standard_normal((documents, 5, OUTPUTS)) * np.logspace(0, -1, OUTPUTS)
    covariances = [np.einsum("nsi,nsj->ij", x, x) for x in (a, g)]
    values, vectors = zip(*(np.linalg.eigh(c / documents / 5) for c in covariances), strict=True)
    rotated = np.einsum("nso,nsi->noi", g @ vectors[1], a @ vectors[0])
    kinds = {
        "activation_covariance": covariances[0],
        "gradient_covariance": covariances[1],
        "activation_eigenvectors": vectors[0],
        "gradient_eigenvectors": vectors[1],
        "activation_eigenvalues": values[0],
        "gradient_eigenvalues": values[1],
        "eigenvalue": np.outer(values[1], values[0]) * 5,
        "eigenvalue_correction": np.square(rotated).mean(0),
    }
    return {kind: {"m": x} for kind, x in kinds.items()}


def dense(factors, damping=0.0):
    values = factors["eigenvalue_correction"]["m"]
    basis = np.kron(factors["gradient_eigenvectors"]["m"], factors["activation_eigenvectors"]["m"])
    return (basis * (values.ravel() + damping * values.mean())) @ basis.T


def difference(first, second):
    return np.linalg.norm(first - second) / np.sqrt((first * second).sum())


def test_against_dense_matrices():
    halves, whole, terms = (fitted(0), fitted(1, 60)), fitted(2), (200, 300)
    q = np.random.default_rng(5).standard_normal((3, OUTPUTS, INPUTS))
    found = compare("m", halves, terms, q, (0.1, 10.0), whole=whole)
    for side, products in (("activation", found.activation), ("gradient", found.gradient)):
        means = [h[f"{side}_covariance"]["m"] / n for h, n in zip(halves, terms, strict=True)]
        assert products.difference() == pytest.approx(difference(*means))
    assert found.hessian.difference() == pytest.approx(difference(*map(dense, halves)))
    for damping in (0.1, 10.0):
        solutions = [
            np.linalg.solve(dense(h, damping), q.reshape(3, -1).T) for h in (*halves, whole)
        ]
        expected = difference(*solutions[:2])
        assert found.inverses[damping].difference() == pytest.approx(expected)
        mean = (solutions[0] + solutions[1]) / 2
        assert found.shared[damping].difference() == pytest.approx(difference(mean, solutions[2]))
    assert found.inverses[10.0].difference() < found.inverses[0.1].difference()


def test_a_half_that_no_token_reached():
    empty = {kind: {"m": np.zeros_like(x["m"])} for kind, x in fitted(0).items()}
    for side, d in (("activation", INPUTS), ("gradient", OUTPUTS)):
        empty[f"{side}_eigenvectors"]["m"] = np.eye(d)
    q = np.ones((1, OUTPUTS, INPUTS))
    found = compare("m", (fitted(0), empty), (200, 200), q, (0.1,))
    assert found.activation.difference() == found.inverses[0.1].difference() == np.inf
    both = compare("m", (empty, empty), (200, 200), q, (0.1,))
    assert np.isnan(both.hessian.difference()) and both.activation_contradicted == 0


def test_spectra_of_factors_with_and_without_stored_eigenvalues():
    factors = fitted(0)
    spectra = factor_spectra(as_hessian(factors))["m"]
    values = factors["activation_eigenvalues"]["m"]
    assert spectra.activation.stable_rank == pytest.approx(values.sum() / values.max())
    assert spectra.gradient.dimension == OUTPUTS
    fewer = {kind: x for kind, x in factors.items() if not kind.endswith("_eigenvalues")}
    again = factor_spectra(as_hessian(fewer))["m"]
    assert again.activation.effective_rank == pytest.approx(spectra.activation.effective_rank)
    neither = {kind: x for kind, x in fewer.items() if not kind.endswith("_covariance")}
    with pytest.raises(CheckpointError, match="no activation eigenvalues, nor the covariances"):
        factor_spectra(as_hessian(neither))


def test_curvatures_take_corrected_eigenvalues_where_there_are_such():
    factors = fitted(0)
    for corrected, kind in ((None, "eigenvalue_correction"), (False, "eigenvalue")):
        found = curvatures(
            as_hessian(factors), Inverse(damping_factor=0.5, ev_correction=corrected)
        )
        values = factors[kind]["m"]
        assert found["m"].condition_number == pytest.approx(values.max() / values.min())
        added = 0.5 * values.mean()
        assert found["m"].damped_condition_number == pytest.approx(
            (values.max() + added) / (values.min() + added)
        )


def test_dead_experts_are_named():
    layer = "layers.0.mlp.experts"
    names = [f"{layer}.expert_0.down_proj", f"{layer}.expert_1.down_proj", "layers.0.q_proj"]
    values = {names[0]: np.ones(3), names[1]: np.zeros(3), names[2]: np.ones(3)}
    factors = {"eigenvalue": values, "activation_eigenvalues": values,
               "gradient_eigenvalues": values}  # fmt: skip
    assert dead_modules(factor_spectra(as_hessian(factors))) == ([names[1]], 2)
