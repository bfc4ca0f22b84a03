"""Damped inverses against a dense solve in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jhessians.linalg.inverse import damped_inverse, inverse_vector_product
from tests.oracles import kfac_numpy
from tests.small import relative_error


def make(o=5, i=7, seed=0):
    random = np.random.default_rng(seed)
    q_s, q_a = (np.linalg.qr(random.standard_normal((d, d)))[0] for d in (o, i))
    eigenvalues = random.random((o, i)) ** 4
    gradient = random.standard_normal((3, 2, o, i))
    return q_s, q_a, eigenvalues, gradient


def narrow(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def eigenpairs(q_s, q_a, eigenvalues):
    """Keywords of `inverse_vector_product`: two square factors must not be swapped in silence."""
    s, a, values = narrow(q_s, q_a, eigenvalues)
    return {"gradient_eigenvectors": s, "activation_eigenvectors": a, "eigenvalues": values}


@pytest.mark.parametrize("damping_factor", [0.1, 1.0])
def test_equals_a_dense_solve(damping_factor):
    q_s, q_a, eigenvalues, gradient = make()
    dense = kfac_numpy.kronecker_fisher(q_s, q_a, eigenvalues)
    dense += damping_factor * eigenvalues.mean() * np.eye(len(dense))
    expected = np.linalg.solve(dense, gradient.reshape(6, -1).T).T.reshape(gradient.shape)

    (v,) = narrow(gradient)
    basis = eigenpairs(q_s, q_a, eigenvalues)
    result = inverse_vector_product(v, **basis, damping_factor=damping_factor)
    assert relative_error(result, expected) < 1e-5
    one = inverse_vector_product(v[1, 0], **basis, damping_factor=damping_factor)
    assert relative_error(one, expected[1, 0]) < 1e-5


def test_without_damping_it_undoes_the_curvature():
    q_s, q_a, eigenvalues, gradient = make()
    eigenvalues += 0.5
    product = q_s @ (eigenvalues * (q_s.T @ gradient @ q_a)) @ q_a.T
    (v,) = narrow(product)
    basis = eigenpairs(q_s, q_a, eigenvalues)
    result = inverse_vector_product(v, **basis, damping_factor=0.0)
    assert relative_error(result, gradient) < 1e-5


def test_damping_is_relative_to_the_mean():
    _, _, eigenvalues, _ = make()
    (values,) = narrow(eigenvalues)
    result = damped_inverse(values[:2], values.mean(), damping_factor=0.25)
    expected = 1 / (eigenvalues[:2] + 0.25 * eigenvalues.mean())
    assert relative_error(result, expected) < 1e-5
    scaled = damped_inverse(1000 * values, 1000 * values.mean(), damping_factor=0.25)
    assert relative_error(1000 * scaled[:2], expected) < 1e-5


def test_damping_may_not_be_negative():
    q_s, q_a, eigenvalues, gradient = make()
    v, values = narrow(gradient, eigenvalues)
    basis = eigenpairs(q_s, q_a, eigenvalues)
    with pytest.raises(ValueError, match="damping_factor is -0.1"):
        damped_inverse(values, values.mean(), damping_factor=-0.1)
    with pytest.raises(ValueError, match="damping_factor is -1"):
        inverse_vector_product(v, **basis, damping_factor=-1.0)
