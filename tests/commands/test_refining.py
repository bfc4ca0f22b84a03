"""`jhessians score --refine cg` against torch bergson's ASTRA with conjugate gradients."""

import json

import numpy as np
import pytest

from jhessians.cli.main import main
from jhessians.interop.score_store import ScoreStore
from tests.commands.test_score import TINY, Case, error
from tests.oracles import bergson, checkpoints

STEPS = 6


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case("llama", tmp_path_factory.mktemp("refining"))


def refined(case, out, *more):
    return case.score(
        out, "--refine", "cg", "--refine_steps", STEPS, "--refine_tolerance", 0, *more
    )


@pytest.mark.parametrize("reduction", ["sum", pytest.param("mean", marks=pytest.mark.slow)])
def test_the_scores_are_those_of_bergsons_astra(case, tmp_path, reduction):
    folder = tmp_path / "theirs" / "hessian"
    folder.mkdir(parents=True)
    run = folder / "kfac"
    words = case.fit(run, "--precision", "fp64", "--hessian_dtype", "fp64",
                     "--loss_reduction", reduction, "--world_size", "1")  # fmt: skip
    assert main(words) == 0
    words = ["--refine", "cg", "--refine_steps", STEPS, "--refine_tolerance", 0,
             "--refine_documents", 12, "--damping_factor", 0.1]  # fmt: skip
    found = case.score(tmp_path / "scores", *words, hessian=run)
    astra = ["--num_steps", STEPS, "--solver", "cg", "--astra.batch_size", 12]
    expected = bergson.ekfac_scores(
        tmp_path / "theirs",
        case.model,
        case.data,
        case.queries,
        loss_reduction=reduction,
        precision="fp32",  # theirs knows no other
        extra=[str(word) for word in astra],
    )
    plain = case.score(tmp_path / "plain", "--damping_factor", 0.1, hessian=run)
    assert error(plain, expected) > 0.01  # or the comparison would show nothing
    assert error(found, expected) < 1e-4


def test_residuals_are_written_and_fall(case, tmp_path):
    refined(case, tmp_path / "scores")
    lines = [json.loads(line) for line in (tmp_path / "scores/refinement.jsonl").open()]
    assert [line["column"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert len(line["residuals"]) == len(line["objectives"]) == STEPS + 1
        assert line["residuals"][-1] < 0.5 * line["residuals"][0]
        assert (np.diff(line["objectives"]) < 0).all()
        assert line["residual"] == line["residuals"][-1] and line["step"] == STEPS


def descended(case, out, *more):
    """Of the 12 documents 6 are held, and a step takes 3 of the others."""
    words = ["--refine", "sgd", "--refine_steps", 8, "--refine_documents", 3, "--refine_lr", 0.02,
             "--refine_momentum", 0.5, "--refine_measure_interval", 4, "--refine_tolerance", 0,
             "--damping_factor", 10]  # fmt: skip
    start = ["score", out, "--hessian", case.run, "--query", case.queries]
    assert main([str(word) for word in (*start, *words, *more)]) == 0
    return ScoreStore(out).read_all()


def test_gradient_descent_keeps_the_best_and_says_how_good_it_is(case, tmp_path, capsys):
    plain = case.score(tmp_path / "plain", "--damping_factor", 10)
    capsys.readouterr()
    found = descended(case, tmp_path / "scores")
    said = capsys.readouterr().out
    assert error(found, plain) > 1e-3
    lines = [json.loads(line) for line in (tmp_path / "scores/refinement.jsonl").open()]
    assert [line["column"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["steps"] == [0, 4, 8]
        best = int(np.argmin(line["objectives"]))
        assert best and line["step"] == line["steps"][best]
        assert line["residual"] == line["residuals"][best] < line["residuals"][0]
        numbers = f"{line['residuals'][0]:>9.3g} {line['residual']:>9.3g} {line['step']:>6}"
        assert f"query {line['column']:<6} {numbers}" in said


def test_steps_that_are_too_long_leave_the_scores_as_they_are(case, tmp_path):
    plain = case.score(tmp_path / "plain", "--damping_factor", 10)
    found = descended(case, tmp_path / "scores", "--refine_lr", 1e300)
    assert error(found, plain) < 1e-9
    for line in map(json.loads, (tmp_path / "scores/refinement.jsonl").open()):
        assert line["step"] == 0 and line["objectives"][1] is None  # no number any more


@pytest.mark.slow
def test_batches_groups_and_devices_do_not_matter_to_descent_either(case, tmp_path):
    expected = descended(case, tmp_path / "scores")
    words = ["--query_batch_size", 1, "--world_size", 1, "--token_batch_size", 128]
    assert error(descended(case, tmp_path / "one", *words), expected) < 1e-6


def test_refined_queries_of_low_rank(case, tmp_path):
    expected = refined(case, tmp_path / "scores")
    whole = refined(case, tmp_path / "whole", "--query_rank", 1000)
    assert error(whole, expected) < 1e-6


@pytest.mark.slow
def test_a_low_rank_loses_something(case, tmp_path):
    expected = refined(case, tmp_path / "scores")
    assert error(refined(case, tmp_path / "rank", "--query_rank", 2), expected) > 1e-3


def test_refined_scores_over_the_factors_self_influences(case, tmp_path):
    expected = refined(case, tmp_path / "scores")
    case.score(tmp_path / "plain", "--normalize", "self")
    own = np.load(tmp_path / "plain/self_influence.npy")[:, None]
    found = refined(case, tmp_path / "own", "--normalize", "self")
    divided = np.divide(expected, own, out=np.zeros_like(expected), where=own != 0)
    assert error(found, divided) < 1e-6


@pytest.mark.slow
def test_groups_and_devices_do_not_matter(case, tmp_path):
    expected = refined(case, tmp_path / "scores")
    one_by_one = refined(case, tmp_path / "one", "--query_batch_size", 1, "--world_size", 1)
    assert error(one_by_one, expected) < 1e-6
    lines = (tmp_path / "one/refinement.jsonl").read_text().splitlines()
    assert [json.loads(line)["column"] for line in lines] == [0, 1, 2]


def test_fewer_documents_are_another_hessian(case, tmp_path):
    expected = refined(case, tmp_path / "scores")
    found = refined(case, tmp_path / "few", "--refine_documents", 4)
    assert error(found, expected) > 1e-3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--refine_steps", "3"], "--refine_steps is given without --refine; give --refine cg"),
        (["--refine", "cg", "--inversion", "pseudoinverse"], "--inversion is pseudoinverse, which"),
        (["--refine_lr", "0.1"], "--refine_lr is given without --refine; give --refine sgd"),
        (["--refine", "cg", "--refine_lr", "0.1"], "--refine_lr is for --refine sgd; leave it out"),
        (["--refine", "sgd", "--refine_lr", "0"], "--refine_lr is 0; expected more than 0"),
        (["--refine", "sgd", "--refine_momentum", "1"], "--refine_momentum is 1; expected less th"),
        (["--refine", "cg", "--unit_normalize"], "--unit_normalize wants every document solved"),
        (["--refine", "cg", "--loss_fn", "log_odds"], "--refine is for cross-entropy"),
        (["--refine", "cg", "--refine_documents", "0"], "--refine_documents"),
    ],
)
def test_what_cannot_be_refined(case, tmp_path, capsys, words, line):
    start = ["score", str(tmp_path / "s"), "--hessian", str(case.run), "--query", str(case.queries)]
    assert main([*start, *words]) != 0
    assert line in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_hessian_without_factors(tmp_path, capsys):
    model = checkpoints.build("llama", tmp_path / "model", seed=1, **TINY)
    data = checkpoints.corpus(model, 2, lengths=(8, 30))
    words = ["compute", str(tmp_path / "run"), "--model", str(model), "--dataset", str(data),
             "--method", "autocorrelation", "--projection_dim", "4", "--quiet"]  # fmt: skip
    assert main(words) == 0
    words = ["score", str(tmp_path / "s"), "--hessian", str(tmp_path / "run"), "--query",
             str(data), "--refine", "cg"]  # fmt: skip
    assert main(words) != 0
    assert "has no Kronecker factors, from which --refine starts" in capsys.readouterr().err
