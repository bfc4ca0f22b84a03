"""Scores, self-influences and their parts against float64 numpy, on one device and on several."""

import numpy as np
import pytest

import jhessians
from jhessians.data.selecting import select
from jhessians.errors import CheckpointError, ConfigError, NumericsError
from jhessians.fitting.autocorrelation import fit_autocorrelations, row_operands
from jhessians.folds import scores as score_folds
from jhessians.influence.inversion import Inverse
from jhessians.influence.queries import QueryPass
from jhessians.influence.row_metrics import DenseHessian, _inverted, metric_of
from jhessians.influence.scoring import ScorePass, as_hessian, module_names
from jhessians.models.config import ExpertsConfig, MLPConfig
from tests import small
from tests.influence.case import LENGTHS, QUERIES, Case, damped, products, total
from tests.small import LLAMA, relative_error
from tests.tolerances import INVARIANCE, SCORES

INVERSES = {
    "damped_inverse": lambda v: 1 / (v + 0.1 * v.mean()),
    "absolute_damped_inverse": lambda v: 1 / (v + 0.1),
    "tikhonov_filtered": lambda v: v / (v**2 + (0.1 * v.mean()) ** 2),
    "pseudoinverse": lambda v: np.where(v > 0.1 * v.mean(), 1 / np.maximum(v, 1e-30), 0),
}


@pytest.fixture(scope="module", params=[1, 7])
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def single():
    return Case()


def rows_of(passing, case, group):
    """All documents' scores and self-influences, in the data's order."""
    scores, own = {}, {}
    for batch in passing.run(case.batches, group):
        for row, number in enumerate(batch.documents):
            if number >= 0:
                scores[int(number)] = None if batch.scores is None else batch.scores[row]
                own[int(number)] = (
                    None if batch.self_influence is None else (batch.self_influence[row])
                )
    return scores, own


@pytest.mark.parametrize("inversion", INVERSES)
def test_scores_are_inner_products_through_the_inverse(case, inversion):
    found = case.score(inversion=inversion, damping_factor=0.1)
    expected = products(case.gradients, case.query_gradients, case.factors, INVERSES[inversion])
    assert relative_error(found, total(expected)) < SCORES


def test_factored_tikhonov_is_a_kronecker_product(case):
    found = case.score(inversion="factored_tikhonov", damping_factor=0.1)
    expected = 0
    for module, gradient in case.gradients.items():
        f = {kind: case.factors[kind][module].astype(np.float64) for kind in case.factors}
        l_s, l_a = f["gradient_eigenvalues"], f["activation_eigenvalues"]
        root, pi = np.sqrt(0.1 * l_s.mean() * l_a.mean()), np.sqrt(l_a.mean() / l_s.mean())
        s = f["gradient_eigenvectors"] / (l_s + root / pi) @ f["gradient_eigenvectors"].T
        a = f["activation_eigenvectors"] / (l_a + root * pi) @ f["activation_eigenvectors"].T
        expected += np.einsum("noi,koi->nk", gradient, s @ case.query_gradients[module] @ a)
    assert relative_error(found, expected) < SCORES


def test_without_a_hessian_they_are_plain_inner_products(case):
    expected = total(products(case.gradients, case.query_gradients))
    assert relative_error(case.score(factors=None), expected) < SCORES


@pytest.mark.parametrize("largest", [score_folds.LARGEST, 100])
def test_gradients_meet_queries_some_rows_and_documents_at_a_time(single, monkeypatch, largest):
    monkeypatch.setattr(score_folds, "CACHED", 1)
    monkeypatch.setattr(score_folds, "BLOCKS", 5)  # which divides no linear's rows
    monkeypatch.setattr(score_folds, "LARGEST", largest)
    expected = total(products(single.gradients, single.query_gradients))
    assert relative_error(single.score(factors=None), expected) < SCORES


def test_self_influence_and_what_is_divided_by_it(case):
    invert, problem, factors = damped(), case.problem, case.factors
    own = total(products(case.gradients, case.gradients, factors, invert)).diagonal()
    of_queries = total(
        products(case.query_gradients, case.query_gradients, factors, invert)
    ).diagonal()  # fmt: skip
    found = jhessians.self_influence(problem, case.batches, factors, documents=len(LENGTHS))
    assert relative_error(found, own) < SCORES

    scores = total(products(case.gradients, case.query_gradients, factors, invert))
    divisor = np.where(own > 0, own, 1)[:, None]
    assert relative_error(case.score(normalize="self"), scores / divisor) < SCORES
    assert relative_error(case.score(normalize="root_self"), scores / divisor**0.5) < SCORES
    cosines = scores / divisor**0.5 / of_queries**0.5
    assert relative_error(case.score(unit_normalize=True), cosines) < SCORES
    assert np.abs(cosines).max() <= 1


def test_aggregated_queries_are_sums_and_means(case):
    scores = total(products(case.gradients, case.query_gradients, case.factors, damped()))
    for how in ("sum", "mean"):
        found = case.score(query_aggregation=how)
        assert relative_error(found[:, 0], getattr(scores, how)(1)) < SCORES


def test_full_rank_loses_nothing_and_low_rank_little(case):
    scores = total(products(case.gradients, case.query_gradients, case.factors, damped()))
    assert relative_error(case.score(query_rank=64), scores) < SCORES
    assert relative_error(case.score(query_rank=64, query_aggregation="sum")[:, 0],
                          scores.sum(1)) < SCORES  # fmt: skip
    assert relative_error(case.score(query_rank=6), scores) > SCORES


@pytest.mark.parametrize("rank", [None, 64])
def test_tokens_and_modules_add_up(case, rank):
    metric = metric_of(case.problem, as_hessian(case.factors), Inverse())
    group = QueryPass(metric, count=len(QUERIES), rank=rank).run(case.queries)
    low_rank = rank is not None
    whole = case.score()
    passing = ScorePass(metric, queries=len(QUERIES), tokens=True, low_rank=low_rank)
    tokens, _ = rows_of(passing, case, group)
    for number, scores in tokens.items():
        assert relative_error(scores.sum(0), whole[number]) < SCORES * 10
        assert not scores[LENGTHS[number] - 1 :].any()  # the last token predicts nothing

    passing = ScorePass(
        metric, queries=len(QUERIES), by_module=True, low_rank=low_rank, self_influence=True
    )
    modules, own = rows_of(passing, case, group)
    expected = products(case.gradients, case.query_gradients, case.factors, damped())
    of_self = products(case.gradients, case.gradients, case.factors, damped())
    largest = max(np.abs(each).max() for each in expected.values())
    for place, name in enumerate(module_names(case.problem)):
        for number in modules:
            difference = modules[number][place] - expected[name][number]
            assert np.abs(difference).max() < SCORES * largest
            assert own[number][place] == pytest.approx(of_self[name][number, number], rel=1e-4)


@pytest.mark.parametrize(
    "joint", [pytest.param(False, marks=pytest.mark.slow), True], ids=["per_module", "global"]
)
def test_rows_in_the_inverse_of_a_dense_hessian(case, joint):
    rows = jhessians.GradientRows(jhessians.Projection(32 if joint else 4))
    problem = case.unshared
    fitted = fit_autocorrelations(problem, case.batches, rows, count=len(LENGTHS), joint=joint)
    hessian = DenseHessian(fitted.hessians, rows, {}, joint)
    found = case.score(factors=hessian)
    own = jhessians.self_influence(problem, case.batches, hessian, documents=len(LENGTHS))
    metric = metric_of(problem, hessian, Inverse())
    group = QueryPass(metric, count=len(QUERIES)).run(case.queries)
    tokens, _ = rows_of(ScorePass(metric, queries=len(QUERIES), tokens=True), case, group)
    summed = np.stack([tokens[n].sum(0) if n in tokens else np.zeros(3) for n in range(10)])
    assert relative_error(summed, found) < SCORES * 10
    if joint:  # what `map_documents` can't make, single projections add up to
        assert (own[[n for n in range(10) if LENGTHS[n] > 1]] > 0).all()
        return
    expected, of_self = 0, 0
    operands = row_operands(problem, rows)
    sides = [
        jhessians.map_documents(rows, problem, batches, documents=n, operands=operands)
        for batches, n in ((case.batches, len(LENGTHS)), (case.queries, len(QUERIES)))
    ]
    for module, hessian_of in fitted.hessians.items():
        values, vectors = np.linalg.eigh(hessian_of.astype(np.float64))
        values = np.maximum(values, 0)
        inverted = (vectors / (values + 0.01 * values.mean())) @ vectors.T
        documents, queries = (side[module].astype(np.float64) for side in sides)
        expected += documents @ inverted @ queries.T
        of_self += np.einsum("nd,de,ne->n", documents, inverted, documents)
    assert relative_error(found, expected) < SCORES
    assert relative_error(own, of_self) < SCORES


@pytest.mark.parametrize("options", [{"devices": 8}, {"token_batch_size": 24}, {"devices": 7}])
def test_batches_and_devices_change_nothing(single, options):
    other = Case(**options)
    for settings in ({}, {"query_rank": 64}, {"normalize": "root_self"}):
        settings = {"factors": single.factors, "damping_factor": 0.1} | settings
        assert relative_error(other.score(**settings), single.score(**settings)) < INVARIANCE * 3


def test_the_order_of_the_data_changes_nothing(single):
    order = np.random.default_rng(3).permutation(len(LENGTHS))
    plan = {"devices": 1, "token_batch_size": 24, "max_shapes": 3}
    moved = small.batches(select(single.documents, order), **plan)
    options = {"factors": single.factors, "damping_factor": 0.1, "documents": len(LENGTHS)}
    found = jhessians.score(single.problem, moved, single.queries, **options)
    assert relative_error(found, single.score(damping_factor=0.1)[order]) < INVARIANCE * 3


def test_linears_with_inputs_of_their_own_are_known_by_their_own_eigenvectors():
    case = Case(**LLAMA)
    factors = jhessians.fit(
        case.problem, case.batches, documents=len(LENGTHS), method=jhessians.Shampoo()
    )
    found = case.score(factors=factors)
    expected = products(case.gradients, case.query_gradients, factors, damped())
    assert relative_error(found, total(expected)) < SCORES


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_experts_have_scores_too(devices):
    mixture = ExpertsConfig(3, 2, MLPConfig(6, "silu", "fused"))
    case = Case(devices, layers=1, experts=mixture)
    expected = products(case.gradients, case.query_gradients, case.factors, damped())
    assert relative_error(case.score(), total(expected)) < SCORES
    assert relative_error(case.score(query_rank=64), total(expected)) < SCORES


def test_what_does_not_fit_is_refused(single):
    factors = {
        kind: {name.replace("layers", "blocks"): x for name, x in arrays.items()}
        for kind, arrays in single.factors.items()
    }
    with pytest.raises(CheckpointError, match="no factors for .*layers.* of this model; it has"):
        single.score(factors=factors)
    without = jhessians.find_sites(single.problem.loss, single.model, single.batches[0])
    problem = jhessians.Problem(single.problem.loss, single.model, without)
    with pytest.raises(CheckpointError, match="one of the two counts the bias"):
        jhessians.score(problem, single.batches, single.queries, single.factors)
    uncorrected = {k: v for k, v in single.factors.items() if k != "eigenvalue_correction"}
    with pytest.raises(CheckpointError, match="has no corrected eigenvalues"):
        single.score(factors=uncorrected, ev_correction=True)
    with pytest.raises(CheckpointError, match="corrected ones are not"):
        single.score(inversion="factored_tikhonov", ev_correction=True)
    singular = {**single.factors, "eigenvalue_correction": {
        name: np.zeros_like(x) for name, x in single.factors["eigenvalue"].items()}}  # fmt: skip
    with pytest.raises(NumericsError, match="is singular .*, and `damping_factor` is 0"):
        single.score(factors=singular, damping_factor=0.0)
    lost = {**single.factors, "eigenvalue_correction": {
        name: np.where(np.arange(x.shape[1]) == 1, 1e-15 * x.max(), x.max())
        for name, x in single.factors["eigenvalue"].items()}}  # fmt: skip
    with pytest.raises(NumericsError, match="is singular .*, and `damping_factor` is 0"):
        single.score(factors=lost, damping_factor=0.0)
    spoilt = {name: x * np.nan for name, x in single.factors["gradient_eigenvectors"].items()}
    with pytest.raises(NumericsError, match="the Hessian of .* holds NaN or infinity"):
        single.score(factors={**single.factors, "gradient_eigenvectors": spoilt})
    for kind, options in (
        ("gradient_eigenvectors", {}),
        ("eigenvalue_correction", {"ev_correction": True}),
        ("activation_eigenvalues", {"inversion": "factored_tikhonov"}),
    ):
        without = {k: v for k, v in single.factors.items() if k != kind}
        word = "corrected eigenvalues" if kind == "eigenvalue_correction" else kind
        with pytest.raises(CheckpointError, match=f"the Hessian has no {word}"):
            single.score(factors=without, **options)
    rows = jhessians.GradientRows(jhessians.Projection(4))
    dense = DenseHessian({}, rows, {}, False)
    with pytest.raises(CheckpointError, match="the Hessian has nothing of"):
        single.score(factors=dense)
    with pytest.raises(ConfigError, match="is for Kronecker factors"):
        single.score(factors=dense, ev_correction=True)


def test_a_dense_hessian_that_is_not_finite_is_named():
    matrix = np.eye(2)
    matrix[0, 1] = np.nan
    with pytest.raises(NumericsError, match="the Hessian of m holds NaN or infinity"):
        _inverted({"m": matrix}, "m", 2, Inverse())
