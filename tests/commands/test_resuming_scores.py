"""Scores and stores that were asked to end, at any batch, go on from there: byte for byte."""

import pytest

from jhessians.commands.build.config import BuildConfig
from jhessians.commands.build.pipeline import build
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.commands.score.config import ScoreConfig
from jhessians.commands.score.pipeline import score
from jhessians.errors import ConfigError
from jhessians.fitting.grace import Terminated
from jhessians.interop.rundir import STATE
from tests.chaos.harness import contents
from tests.commands.test_resuming import MOST, Ending
from tests.oracles import checkpoints


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, data, queries, and a fitted Hessian."""
    sizes = {"n_embd": 16, "n_head": 2, "n_inner": 20, "n_layer": 2}
    folder = checkpoints.build("gpt2", tmp_path_factory.mktemp("scores") / "gpt2", seed=1, **sizes)
    data = checkpoints.corpus(folder, 24, lengths=(24, 9, 2, 1, 17, 30))
    checkpoints.corpus(folder, 3, seed=7, lengths=(8, 30, 17), name="query.jsonl")
    compute(ComputeConfig(
        str(folder / "run"), model=str(folder), dataset=str(data), quiet=True, world_size=1,
        token_batch_size=32, use_dataset_labels=True,
    ))  # fmt: skip
    return folder


@pytest.fixture
def config(work, tmp_path):
    def make(name, **options):
        query = {} if options.get("self") else {"query": str(work / "query.jsonl")}
        given = {"hessian": str(work / "run"), "quiet": True, "world_size": 1, **query}
        return ScoreConfig(run_path=str(tmp_path / name), **(given | options))

    return make


@pytest.mark.parametrize("options", [
    {"query_batch_size": 2, "normalize": "root_self", "by_module": "layer"},
    pytest.param({"query_batch_size": 1, "top": 3, "query_rank": 2}, marks=pytest.mark.slow),
    {"attribute_tokens": True, "world_size": 2},
    {"self": True},
], ids=["groups", "top", "tokens", "self"])  # fmt: skip
def test_scores_may_end_anywhere(config, options, tmp_path, monkeypatch):
    score(config("whole", **options))
    expected = contents(tmp_path / "whole")
    ends = end_often(lambda: score(config("part", resume=True, **options)), monkeypatch)
    assert ends > 1
    require_equal(contents(tmp_path / "part"), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "whole"]
    assert not (tmp_path / "part" / STATE).exists()


def end_often(run, monkeypatch):
    """Go on with a run that is asked to end ever later, until it is finished."""
    ending, ends = Ending(monkeypatch), 0
    for look in (1, 3, 6, MOST):
        ending.left = look
        try:
            run()
        except Terminated:
            ends += 1
        else:
            return ends
    raise AssertionError("it never finished")


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("options", [
    {"projection_dim": 4, "normalizer": "adafactor", "unit_normalize": True},
    pytest.param({"rank": 2, "store_dtype": "bf16"}, marks=pytest.mark.slow),
    {"aggregation": "mean", "world_size": 2},
    pytest.param(
        {"attribute_tokens": True, "projection_dim": 4, "projection_target": "global"},
        marks=pytest.mark.slow,
    ),
], ids=["projected", "rank", "mean", "tokens"])  # fmt: skip
def test_a_store_may_end_anywhere(work, options, tmp_path, monkeypatch):
    def config(name, **more):
        given = {"model": str(work), "dataset": str(work / "docs.jsonl"), "quiet": True,
                 "world_size": 1, "token_batch_size": 32, "precision": "fp32"}  # fmt: skip
        return BuildConfig(run_path=str(tmp_path / name), **(given | options | more))

    build(config("whole"))
    expected = contents(tmp_path / "whole")
    assert end_often(lambda: build(config("part", resume=True)), monkeypatch) > 1
    require_equal(contents(tmp_path / "part"), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "whole"]


def test_other_queries_are_refused(config, work, tmp_path, monkeypatch):
    Ending(monkeypatch).left = 4
    with pytest.raises(Terminated):
        score(config("scores"))
    (tmp_path / "other.jsonl").write_text('{"text": "another question"}\n')
    with pytest.raises(ConfigError, match="is an unfinished run, and the queries changed since"):
        score(config("scores", query=str(tmp_path / "other.jsonl"), resume=True))
    with pytest.raises(ConfigError, match="`damping_factor` is 0.5 and was 0.01"):
        score(config("scores", damping_factor=0.5, resume=True))
