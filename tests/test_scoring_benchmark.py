"""The benchmark of influence scores: its arithmetic, its command lines, and small runs of it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jhessians.interop.score_store import ScoreWriter

BENCHMARKS = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a file of the benchmark, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_worst_query_is_reported(module):
    compare = module("scoring_agreement").compare
    scores = np.random.default_rng(0).normal(size=(3, 50))
    same = compare(scores, scores)
    assert same.difference == 0 and same.ranks == pytest.approx(1)
    other = scores.copy()
    other[1, 7] += 0.5 * np.abs(scores[1]).max()
    found = compare(other, scores)
    assert found.difference == pytest.approx(0.5)
    assert 0.5 < found.ranks < 1
    assert compare(-scores, scores).ranks == pytest.approx(-1)
    with pytest.raises(ValueError, match="of"):
        compare(scores, scores[:, 1:])


def test_stores_and_kronfluences_files_are_read_alike(module, tmp_path):
    read = module("scoring_agreement").read
    scores = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    writer = ScoreWriter(tmp_path / "store", documents=6, queries=2)
    writer.write(np.arange(6), scores)
    save_file({"all_modules": np.ascontiguousarray(scores.T)}, tmp_path / "documents.safetensors")
    # Two documents of four tokens, whose last ones the others leave out.
    tokens = np.zeros((2, 2, 4), np.float32)
    tokens[:, :, :3] = scores.T.reshape(2, 2, 3)
    save_file({"all_modules": tokens}, tmp_path / "tokens.safetensors")
    for place in ("store", "documents.safetensors", "tokens.safetensors"):
        np.testing.assert_array_equal(read(tmp_path / place), scores.T)


def fitted(module, tmp_path):
    fits = {name: tmp_path / name for name in ("jhessians", "kronfluence")}
    return module("scoring_tools").Fitted(Path("model"), Path("documents"), fits)


def test_every_tool_gets_its_fit_or_does_not_start(module, tmp_path):
    options = module("scoring").arguments(["--shape", "tiny"])
    found = module("scoring_tools").scorers(
        options, fitted(module, tmp_path), "16", Path("queries"), 4
    )
    assert [each.tool.name for each in found] == ["jhessians", "bergson", "kronfluence"]
    for each in found[:2]:
        assert each.tool.command[each.tool.command.index("--query_batch_size") + 1] == "4"
    # kronfluence has this damping unless told otherwise, and the others' defaults differ.
    for each, flag in zip(
        found[:2],
        ("--damping_factor", "--hessian_pipeline_cfg.inversion_cfg.damping_factor"),
        strict=True,
    ):
        assert each.tool.command[each.tool.command.index(flag) + 1] == "0.1"
    for each in found[1:]:
        with pytest.raises(module("measure").RunFailed, match="no fit"):
            each.prepare(tmp_path / "out")
    (tmp_path / "jhessians").mkdir()
    found[1].prepare(tmp_path / "out")
    assert (tmp_path / "out" / "hessian" / "kfac").resolve() == (tmp_path / "jhessians").resolve()


def test_bergson_has_no_self_influence(module, tmp_path):
    options = module("scoring").arguments(["--shape", "tiny"])
    found = module("scoring_tools").scorers(
        options, fitted(module, tmp_path), "self", Path("queries"), 1
    )
    assert [each.tool.name for each in found] == ["jhessians", "kronfluence"]
    assert "--query" not in found[0].tool.command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks 0", "'0' is no number of queries, nor tokens or self"),
        ("--tasks many", "'many' is no number of queries"),
        ("--tokens 64 --chunk 128", "--chunk must be at least 2, and at most --tokens"),
        ("--repeats 0", "--repeats must be at least 1"),
    ],
)
def test_wrong_options_end_in_a_line(module, capsys, words, message):
    with pytest.raises(SystemExit):
        module("scoring").main(words.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_page_has_a_row_for_every_tool(module, tmp_path):
    report, measure = module("scoring_report"), module("measure")
    agreement = module("scoring_agreement").Agreement

    def run(tool, seconds, peak):
        return measure.Run(tool, seconds, {}, peak, 2 * seconds, 0.5)

    runs = [run("jhessians", 10.0, 10**9), run("bergson", 25.0, 4 * 10**9)] * 2
    found = {"bergson": agreement(5e-6, 0.9999991)}
    comparisons = [
        report.Comparison("small", "16", runs, found, ["a note"]),
        report.Comparison("small", "self", runs[::2], {}, []),
    ]
    record = report.Record("a machine", {"jax": "0"}, "a command", {"small": "(1)"}, 6.0,
                           comparisons)  # fmt: skip
    page = report.markdown(record)
    assert "| 16 | jhessians | 10.0 | 20.0 | 1.00 |  |  |  |  |" in page
    assert "|  | bergson | 25.0 | 50.0 | 4.00 | **2.50x** | 0.25x | 5.0e-06 | 0.999999 |" in page
    assert "| self | jhessians | 10.0 |" in page and "- 16: a note" in page
    assert "2 runs each" in page
    report.write(record, tmp_path)
    assert json.loads((tmp_path / "scoring-small.json").read_text())["shapes"] == {"small": "(1)"}


@pytest.mark.slow
def test_the_peers_agree(module, tmp_path, monkeypatch):
    """bergson with our factors and kronfluence with its own, run as the benchmark runs them."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    scoring, compare = module("scoring"), module("compare")
    words = ["--shape", "tiny", "--tokens", "1024", "--peers-env", sys.prefix]
    options = scoring.arguments(words)
    model = compare.build_model(tmp_path, compare.PRESETS["tiny"][0], 1024 + 3 * 64, 64)
    documents, asking = scoring.split(model, tmp_path, 3)
    fits = scoring.fit(options, tmp_path, model, documents)
    queries = tmp_path / "queries.jsonl"
    for task, shape in (("3", (3, 16)), ("tokens", (1, 16 * 63))):
        queries.write_text("".join(asking[: scoring.queries_of(task)]))
        # Two queries at once: more than one pass.
        peers = module("scoring_tools").scorers(options, fits, task, queries, 2)[1:]
        outs = {each.tool.name: tmp_path / each.tool.name for each in peers}
        runs = list(scoring.run_in_turn(peers, outs, 1))
        assert [run.tool for run in runs] == ["bergson", "kronfluence"]
        places = [outs[each.tool.name] / each.scores for each in peers]
        agreement = module("scoring_agreement")
        assert agreement.read(places[0]).shape == shape
        found = agreement.agreement(*places)
        assert found.difference < 5e-5 and found.ranks > 0.9999


@pytest.mark.slow
def test_whole_benchmark(tmp_path):
    """All tasks of a tiny shape; the benchmark itself compares the scores with jhessians'."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    words = ["--shape", "tiny", "--tokens", "1024", "--repeats", "1", "--skip-install"]
    words += ["--tasks", "1", "3", "tokens", "self", "--peers-env", sys.prefix]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scoring.py"), *words, "--results", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "scoring-tiny.json").read_text())
    tools = [[run["tool"] for run in c["runs"]] for c in record["comparisons"]]
    everyone = ["jhessians", "bergson", "kronfluence"]
    assert tools == [everyone, everyone, everyone, ["jhessians", "kronfluence"]]
    for comparison in record["comparisons"]:
        for found in comparison["agreement"].values():
            assert found["difference"] < 5e-5 and found["ranks"] > 0.9999
    page = (tmp_path / "scoring-tiny.md").read_text()
    assert str(tmp_path) not in page
    assert page in done.stdout
