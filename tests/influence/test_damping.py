"""What damping factors are worth, against a dense Gauss-Newton matrix and known spectra."""

import jax
import numpy as np
import pytest

import jhessians
from jhessians.influence.damping import choose, mean_gains, try_dampings
from tests.influence.test_gauss_newton import LENGTHS, Case
from tests.small import relative_error

DAMPINGS = (0.01, 0.3, 10.0)


@pytest.fixture(scope="module")
def case():
    with jax.enable_x64(True):
        yield Case("gpt_neox")


def random_factors(shapes):
    """Eigenvectors and eigenvalues of nothing in particular."""
    random = np.random.default_rng(1)
    kinds = {"gradient_eigenvectors": 0, "activation_eigenvectors": 1}
    found = {
        kind: {
            name: np.linalg.qr(random.standard_normal((shape[axis], shape[axis])))[0]
            for name, shape in shapes.items()
        }
        for kind, axis in kinds.items()
    }
    values = {name: random.random(shape) for name, shape in shapes.items()}
    return found | {"eigenvalue_correction": values}


def dense(case):
    """G of all documents as a matrix; `test_gauss_newton.py` compares products with the logits'."""
    problem, batches = case.problem()
    total = sum(o * i for o, i in case.shapes.values())
    identity, start = {}, 0
    for name, (o, i) in case.shapes.items():
        identity[name] = np.eye(total)[:, start : start + o * i].reshape(total, o, i)
        start += o * i
    return case.flat(jhessians.gauss_newton_product(problem, batches, identity))


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_gains_and_residuals_against_a_dense_matrix(case, devices):
    problem, batches = case.problem(devices)
    factors, done = random_factors(case.shapes), []
    found = try_dampings(
        problem, batches, case.vectors(), factors, DAMPINGS, documents=len(LENGTHS),
        advance=done.append,
    )  # fmt: skip
    assert done == [1, 1, 1]
    g, q = dense(case) / len(LENGTHS), case.flat(case.vectors())

    def worth(x):
        return (q * x).sum(1) ** 2 / ((x @ g) * x).sum(1)

    for number, damping in enumerate(DAMPINGS):
        parts, added = [], []
        for name in case.shapes:
            q_s, q_a = (factors[f"{s}_eigenvectors"][name] for s in ("gradient", "activation"))
            values = factors["eigenvalue_correction"][name]
            basis = np.kron(q_s, q_a)
            h = (basis * values.ravel()) @ basis.T + damping * values.mean() * np.eye(values.size)
            v = case.vectors()[name].reshape(3, -1)
            parts.append(np.linalg.solve(h, v.T).T)
            added.append(np.full(values.size, damping * values.mean()))
        x = np.concatenate(parts, 1)
        left = q - x @ g - x * np.concatenate(added)
        expected = np.linalg.norm(left, axis=1) / np.linalg.norm(q, axis=1)
        assert relative_error(found.gains[number], worth(x) / worth(q)) < 1e-8
        assert relative_error(found.residuals[number], expected) < 1e-8


DIMENSION = 60
GRID = tuple(float(x) for x in np.logspace(-5, 1, 13))


def synthetic(terms, held_out, seed):
    """Gains over `GRID` of an H of few terms, by a G of others and by the true one; true errors."""
    random = np.random.default_rng(seed)
    truth = np.logspace(0, -3, DIMENSION)

    def sampled(n):
        rows = random.standard_normal((n, DIMENSION)) * np.sqrt(truth)
        return rows.T @ rows / n

    h, g = sampled(terms), sampled(held_out)
    q = random.standard_normal((16, DIMENSION)) * np.sqrt(truth)
    gains = {"held out": [], "true": []}
    errors = []
    for damping in GRID:
        x = np.linalg.solve(h + damping * np.trace(h) / DIMENSION * np.eye(DIMENSION), q.T).T
        for name, matrix in (("held out", g), ("true", np.diag(truth))):
            gains[name].append((q * x).sum(1) ** 2 / ((x @ matrix) * x).sum(1))
        # In the norm of the true G, of the best multiple of x.
        multiple = (q * x).sum(1) / (x * x * truth).sum(1)
        wrong = multiple[:, None] * x - q / truth
        errors.append((wrong * wrong * truth).sum(1) / (q * q / truth).sum(1))
    return np.array(gains["held out"]), np.array(gains["true"]), np.array(errors)


@pytest.mark.parametrize("terms", [45, 120, 600])
def test_held_out_gains_find_the_damping_that_is_nearest_to_the_truth(terms):
    lost = []
    for seed in range(5):
        held_out, true, errors = synthetic(terms, 200, seed)
        chosen = GRID.index(choose(GRID, held_out).damping)
        # The gain is largest where the error to G⁻¹ q is smallest, whatever H is.
        assert (true.argmax(0) == errors.argmin(0)).all()
        means = np.log(true).mean(1)
        lost.append(means.max() - means[chosen])
        assert means.max() - means[0] > 0.1 or terms == 600  # or any choice would do
        assert means.max() - means[-1] > 0.1
    assert np.mean(lost) < 0.05


def test_more_terms_need_less_damping():
    chosen = [
        np.mean([np.log(choose(GRID, synthetic(n, 200, s)[0]).damping) for s in range(5)])
        for n in (30, 120, 2000)
    ]
    assert chosen[0] > chosen[1] + 1 > chosen[2] + 2


def test_in_sample_gains_would_ask_for_no_damping():
    """Why documents are held out: with G = H the gain has no maximum within."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((120, DIMENSION)) * np.logspace(0, -1.5, DIMENSION)
    h = rows.T @ rows / 120
    q = random.standard_normal((8, DIMENSION))
    gains = []
    for damping in GRID:
        x = np.linalg.solve(h + damping * np.trace(h) / DIMENSION * np.eye(DIMENSION), q.T).T
        gains.append((q * x).sum(1) ** 2 / ((x @ h) * x).sum(1))
    assert choose(GRID, np.array(gains)).best == GRID[0]


def test_the_largest_factor_that_is_as_good():
    dampings = (0.01, 0.1, 1.0, 10.0)
    gains = np.array([2.0, 2.01, 1.99, 1.0])[:, None] * np.ones(3)
    assert choose(dampings, gains) == (1.0, pytest.approx(1.99), 0.1, pytest.approx(2.01), "")
    gains = np.array([[1.0, 1.0], [4.0, 4.0]])
    assert choose((0.1, 1.0), gains) == (1.0, pytest.approx(4), 1.0, pytest.approx(4), "largest")
    assert choose((0.1, 1.0), gains[::-1]).at_end == "smallest"


def test_a_difference_must_stand_out_from_what_queries_differ_by():
    random = np.random.default_rng(0)
    each = random.lognormal(0, 1, 50)  # what queries have in common at all factors
    gains = np.array([2.0, 1.8])[:, None] * each * random.lognormal(0, 0.05, (2, 50))
    assert choose((0.1, 1.0), gains).damping == 0.1
    noisy = gains * random.lognormal(0, 2, (2, 50))
    assert choose((0.1, 1.0), noisy).damping == 1.0


def test_queries_without_gradient_are_left_out():
    gains = np.array([[np.nan, 2.0], [np.nan, 1.0]])
    assert choose((0.1, 1.0), gains).damping == 0.1
    assert mean_gains(gains).tolist() == pytest.approx([2, 1])
    assert choose((0.1, 1.0), gains[:, :1]) is None
    assert np.isnan(mean_gains(gains[:, :1])).all()
