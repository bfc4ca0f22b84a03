"""Refined solutions against a dense solve in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhessians
from jhessians.errors import ConfigError
from jhessians.influence.factors import Factors
from tests.influence.test_gauss_newton import LENGTHS, damped, gpt_neox
from tests.small import relative_error


@pytest.fixture(scope="module")
def case():
    with jax.enable_x64(True):
        yield gpt_neox()


@pytest.fixture(scope="module")
def factors(case):
    return factors_of(case)


def factors_of(case):
    """Fitted to labels that the model draws."""
    problem, batches = case.problem()
    sampled = replace(problem, loss=jhessians.NextTokenLoss())
    fitted = jhessians.fit(sampled, batches, documents=len(LENGTHS), dtype=np.float64)
    return Factors(fitted, jhessians.Inverse(damping_factor=1.0))


def refined(case, factors, devices=1, **options):
    problem, batches = case.problem(devices)
    options = {"documents": len(LENGTHS)} | options
    return jhessians.refine(problem, batches, case.vectors(), factors, **options)


@pytest.mark.parametrize("devices", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_many_steps_give_the_solution(case, factors, devices):
    found = refined(case, factors, devices, steps=300, tolerance=1e-9)
    expected = np.linalg.solve(damped(case, factors), case.flat(case.vectors()).T).T
    assert relative_error(case.flat(found.solutions), expected) < 1e-7
    assert (found.residuals[-1] < 1e-9).all()
    assert len(found.residuals) < 301


def test_residuals_and_objectives_are_those_of_the_solutions(case, factors):
    found = refined(case, factors, steps=7, tolerance=0.0)
    matrix, q = damped(case, factors), case.flat(case.vectors())
    x = case.flat(found.solutions)
    left = q - x @ matrix
    assert found.residuals.shape == found.objectives.shape == (8, 3)
    assert relative_error(
        found.residuals[-1], np.linalg.norm(left, axis=1) / np.linalg.norm(q, axis=1)
    ) < 1e-8  # fmt: skip
    objectives = ((x @ matrix) * x).sum(1) / 2 - (x * q).sum(1)
    assert relative_error(found.objectives[-1], objectives) < 1e-8
    assert (np.diff(found.objectives, axis=0) < 0).all()


def test_no_step_gives_what_the_factors_give(case, factors):
    found = refined(case, factors, steps=0)
    expected = factors.apply({name: jnp.asarray(x) for name, x in case.vectors().items()})
    assert relative_error(case.flat(found.solutions), case.flat(expected)) < 1e-12
    assert found.residuals.shape == (1, 3)


def test_queries_that_are_done_stay_as_they_are(case, factors):
    vectors = case.vectors()
    problem, batches = case.problem()
    # The second query is zero: done before the first step.
    vectors = {name: x * np.array([1.0, 0.0, 1.0])[:, None, None] for name, x in vectors.items()}
    found = jhessians.refine(problem, batches, vectors, factors, steps=5, documents=len(LENGTHS))
    assert not case.flat(found.solutions)[1].any()
    alone = {name: x[:1] for name, x in vectors.items()}
    single = jhessians.refine(problem, batches, alone, factors, steps=5, documents=len(LENGTHS))
    assert relative_error(case.flat(found.solutions)[0], case.flat(single.solutions)[0]) < 1e-10


def test_documents_are_counted_where_nobody_says_how_many(case, factors):
    found = refined(case, factors, steps=3, documents=None)
    expected = refined(case, factors, steps=3, documents=sum(n > 1 for n in LENGTHS))
    assert relative_error(case.flat(found.solutions), case.flat(expected.solutions)) < 1e-12


def test_what_cannot_be_refined(case, factors):
    with pytest.raises(ConfigError, match="is pseudoinverse, .* expects damped_inverse or"):
        refined(case, factors.damping(0.1, inversion="pseudoinverse"))
    with pytest.raises(ValueError, match="steps is -1; expected 0 or more"):
        refined(case, factors, steps=-1)
