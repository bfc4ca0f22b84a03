"""`jhessians score --refine cg` against torch bergson's ASTRA with conjugate gradients."""

import json

import numpy as np
import pytest

from jhessians.cli.main import main
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
        (["--refine", "cg", "--unit_normalize"], "knows no self-influences; leave --unit_norm"),
        (["--refine", "cg", "--normalize", "self"], "knows no self-influences; leave --normalize"),
        (["--refine", "cg", "--query_rank", "2"], "keeps whole queries; leave --query_rank out"),
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
