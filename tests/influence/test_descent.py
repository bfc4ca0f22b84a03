"""Refinement by gradient descent against its steps in numpy, and against a dense solve."""

from functools import cache

import jax
import numpy as np
import pytest

import jhessians
from jhessians.data.drawing import Draws
from jhessians.errors import ConfigError, DatasetError
from jhessians.influence.gauss_newton import GaussNewtonPass
from tests.influence.test_gauss_newton import LENGTHS, damped, gpt_neox
from tests.influence.test_refinement import factors_of
from tests.small import relative_error

DESCENT = {"lr": 0.05, "momentum": 0.5, "lr_decay": 0.8, "lr_decay_interval": 3}


@pytest.fixture(scope="module")
def case():
    with jax.enable_x64(True):
        yield gpt_neox()


@pytest.fixture(scope="module")
def factors(case):
    """Damped so that the steps' matrices, preconditioned, have no eigenvalue above 25."""
    return factors_of(case).damping(10.0)


@cache
def compiled_once(case, devices):
    problem, batches = case.problem(devices)
    return GaussNewtonPass(problem), batches


def draws(case, count, devices=1, **options):
    options = {"seed": 5, "token_batch_size": 16} | options
    return Draws(case.documents, np.arange(len(LENGTHS)), count, devices=devices, **options)


def refined(case, factors, count=3, devices=1, steps=12, tolerance=0.0, token_batch=16, **changes):
    product, held = compiled_once(case, devices)
    drawn = draws(case, count, devices, token_batch_size=token_batch)
    return jhessians.refine_by_sgd(
        product,
        lambda step: jhessians.Drawn(drawn.batches(step), count),
        held,
        case.vectors(),
        factors,
        held_documents=len(LENGTHS),
        steps=steps,
        tolerance=tolerance,
        descent=jhessians.Descent(**DESCENT | changes),
    )


def dense_of(case, numbers):
    """The mean of some documents' matrices; one that is a single token has none."""
    places = {n: k for k, n in enumerate(np.flatnonzero(np.array(LENGTHS) > 1))}
    total = np.zeros_like(case.dense())
    for number in numbers:
        if number in places:
            logits, jacobian = case.parts[places[number]]
            for z, j in zip(logits, jacobian, strict=True):
                p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                total += j.T @ (np.diag(p) - np.outer(p, p)) @ j
    return total / len(numbers)


def preconditioner(case, factors):
    """(H + D)⁻¹, dense, from the eigenvectors and the damped corrected eigenvalues."""
    blocks = []
    for name, (o, i) in case.shapes.items():
        basis = np.kron(*(np.asarray(factors[f"{side}_eigenvectors"][name])
                          for side in ("gradient", "activation")))  # fmt: skip
        values = np.asarray(factors["eigenvalue_correction"][name]).reshape(o * i)
        damping = factors.inverse.damping_factor * values.mean()
        blocks.append(basis @ np.diag(1 / (values + damping)) @ basis.T)
    size = sum(len(block) for block in blocks)
    whole, start = np.zeros((size, size)), 0
    for block in blocks:
        stop = start + len(block)
        whole[start:stop, start:stop] = block
        start = stop
    return whole


def descended(case, factors, numbers_of, steps):
    """The last x of all steps, in numpy."""
    inverse, q = preconditioner(case, factors), case.flat(case.vectors())
    damping = damped(case, factors) - case.dense() / len(LENGTHS)
    x, b, lr = q @ inverse, 0.0, DESCENT["lr"]
    for step in range(steps):
        if step and step % DESCENT["lr_decay_interval"] == 0:
            lr *= DESCENT["lr_decay"]
        residual = x @ (dense_of(case, numbers_of(step)) + damping) - q
        b = DESCENT["momentum"] * b + residual @ inverse
        x = x - lr * b
    return x


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_steps_are_those_of_the_formulas(case, factors, devices):
    # Measured before and after only: what is kept is where they end, or they would show nothing.
    found = refined(case, factors, devices=devices, measure_interval=12)
    assert (found.kept == 1).all() and found.steps.tolist() == [0, 12]
    expected = descended(case, factors, draws(case, 3).of_step, 12)
    assert relative_error(case.flat(found.solutions), expected) < 1e-9


def test_what_is_kept_is_the_best_that_was_measured(case, factors):
    found = refined(case, factors, measure_interval=5)
    assert found.steps.tolist() == [0, 5, 10, 12]
    assert found.residuals.shape == found.objectives.shape == (4, 3)
    assert (found.kept == found.objectives.argmin(0)).all()
    matrix, q, x = damped(case, factors), case.flat(case.vectors()), case.flat(found.solutions)
    objectives = ((x @ matrix) * x).sum(1) / 2 - (x * q).sum(1)
    assert relative_error(objectives, found.objectives.min(0)) < 1e-8
    left = np.linalg.norm(q - x @ matrix, axis=1) / np.linalg.norm(q, axis=1)
    assert relative_error(left, found.residuals[found.kept, np.arange(3)]) < 1e-8


def test_all_documents_at_each_step_lead_to_the_solution(case, factors):
    found = refined(case, factors, count=len(LENGTHS), steps=400, tolerance=1e-7, lr=0.356,
                    lr_decay=1.0, momentum=0.667)  # fmt: skip
    expected = np.linalg.solve(damped(case, factors), case.flat(case.vectors()).T).T
    assert relative_error(case.flat(found.solutions), expected) < 1e-5
    assert found.steps[-1] < 400
    assert (found.residuals[found.kept, np.arange(3)] <= 1e-7).all()


def test_steps_that_are_far_too_long_keep_the_start(case, factors):
    found = refined(case, factors, lr=1e30, steps=60, momentum=0.99)
    assert not found.kept.any() and found.steps[-1] < 60
    start = refined(case, factors, steps=0)
    assert relative_error(case.flat(found.solutions), case.flat(start.solutions)) == 0
    assert not np.isfinite(found.objectives[-1]).any()


def test_it_is_the_same_bit_for_bit_again_and_in_other_batches_nearly(case, factors):
    found, again = (refined(case, factors) for _ in range(2))
    assert all((found.solutions[name] == x).all() for name, x in again.solutions.items())
    other = refined(case, factors, token_batch=40)
    assert relative_error(case.flat(other.solutions), case.flat(found.solutions)) < 1e-10


def test_a_document_comes_once_in_an_epoch(case):
    drawn = draws(case, 3)
    first, second = (np.concatenate([drawn.of_step(2 * epoch + k) for k in range(2)])
                     for epoch in range(2))  # fmt: skip
    assert len(set(first)) == len(set(second)) == 6
    assert first.tolist() != second.tolist()
    assert drawn.of_step(1).tolist() == draws(case, 3).of_step(1).tolist()
    other = draws(case, 3, seed=6)
    assert any((drawn.of_step(k) != other.of_step(k)).any() for k in range(4))


def test_all_steps_have_the_same_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 60, 300)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    documents = jhessians.Documents(np.arange(offsets[-1], dtype=np.int32), None, offsets)
    drawn = Draws(documents, np.arange(20, 300), 30, 0, token_batch_size=200, devices=2)
    shapes = set()
    for step in range(20):
        seen = []
        for batch in drawn.batches(step):
            shapes.add(batch.tokens.shape)
            seen += batch.tokens[batch.position_mask.any(1), 0].tolist()
        chosen = drawn.of_step(step)
        assert chosen.min() >= 20
        assert sorted(seen) == [offsets[n] for n in chosen if lengths[n] > 1]
    assert len(shapes) <= 4 and all(n % 2 == 0 and n * s <= 400 for n, s in shapes)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"lr": 0.0}, "lr is 0.0; expected more than 0"),
        ({"momentum": 1.0}, "momentum is 1.0; expected from 0 to less than 1"),
        ({"lr_decay": 1.5}, "lr_decay is 1.5; expected more than 0 and at most 1"),
        ({"measure_interval": 0}, "measure_interval is 0; expected 1 or more"),
    ],
)
def test_values_out_of_range(change, line):
    with pytest.raises(ValueError, match=line):
        jhessians.Descent(**change)


def test_what_cannot_be_refined(case, factors):
    with pytest.raises(ConfigError, match="is pseudoinverse, .* expects damped"):
        refined(case, factors.damping(0.1, inversion="pseudoinverse"))
    with pytest.raises(ValueError, match="steps is -1; expected 0 or more"):
        refined(case, factors, steps=-1)
    with pytest.raises(DatasetError, match="a step takes 8 documents, of 7"):
        draws(case, 8)
