"""`jhessians evaluate`: its measures on scores with a known answer, and banks from end to end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr

from jhessians.cli.main import main
from jhessians.commands.evaluate.reading import read_scores
from jhessians.evaluation.bank import Bank, Contents
from jhessians.interop.score_store import ScoreWriter

DOCUMENTS, QUERIES, MODELS = 12, 3, 10
SMALL = ("--models", "3", "--epochs", "1", "--max_tokens", "900", "--query_split", "train",
         "--token_batch_size", "512", "--quiet")  # fmt: skip


def run(*words):
    return main([str(word) for word in words])


def write_scores(folder, scores, **more):
    writer = ScoreWriter(folder, documents=len(scores), queries=scores.shape[1], **more)
    writer.write(np.arange(len(scores)), scores)
    writer.flush()
    return folder


@pytest.fixture
def made(tmp_path):
    """Scores, and a bank whose models lose what the scores predict, but for some noise."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((DOCUMENTS, QUERIES)).astype(np.float32)
    subsets = rng.random((MODELS, DOCUMENTS)) < 0.5
    losses = 5 - subsets @ scores + 2 * rng.standard_normal((MODELS, QUERIES))
    bank = Bank(subsets, losses.astype(np.float32), np.zeros(QUERIES, np.float32),
                Contents("documents", "queries"))  # fmt: skip
    (tmp_path / "bank").mkdir()
    bank.save(tmp_path / "bank")
    write_scores(tmp_path / "scores", scores)
    return tmp_path, scores, bank


def test_lds_of_a_store(made, capsys):
    folder, scores, bank = made
    write_scores(folder / "other", -scores)
    words = ["--bank", folder / "bank", "--json", folder / "lds.json"]
    assert run("evaluate", "lds", folder / "scores", "--against", folder / "other", *words) == 0
    predicted = bank.subsets @ scores
    expected = [spearmanr(predicted[:, q], -bank.losses[:, q]).statistic for q in range(QUERIES)]
    found = json.loads((folder / "lds.json").read_text())
    np.testing.assert_allclose(found["queries"], expected, atol=1e-9)
    assert found["means"]["LDS"]["mean"] == pytest.approx(np.mean(expected))
    assert found["means"]["difference"]["mean"] == pytest.approx(2 * np.mean(expected))
    shown = capsys.readouterr().out
    assert re.search(rf"LDS +{np.mean(expected):.3f}  \[", shown) and "10 models" in shown


def test_scores_of_tokens_are_summed_and_lower_may_be_better(made):
    folder, scores, _ = made
    counts = np.arange(DOCUMENTS) % 3 + 1
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    of_tokens = np.repeat(scores / counts[:, None], counts, axis=0)
    tokens = folder / "tokens"
    writer = ScoreWriter(tokens, documents=DOCUMENTS, queries=QUERIES, offsets=offsets)
    writer.write(np.arange(len(of_tokens)), of_tokens)
    writer.flush()
    np.testing.assert_allclose(read_scores(tokens), scores, rtol=1e-5)
    config = {"steps": [{"score": {"score_cfg": {"higher_is_better": False}}}]}
    (tokens / "config.yaml").write_text(yaml.safe_dump(config))
    np.testing.assert_allclose(read_scores(tokens), -scores, rtol=1e-5)


def test_recall_of_a_store(made, capsys):
    folder, scores, _ = made
    order = np.argsort(-scores, axis=0)
    relevant = [order[[0, 5], 0], order[[1, 2], 1], order[[0, 1], 2]]
    rows = [json.dumps({"text": "x", "sources": each.tolist()}) for each in relevant]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    assert run("evaluate", "recall", folder / "scores", "--relevant", "sources",
               "--query", folder / "queries.jsonl", "--recall_at", "1", "2",
               "--json", folder / "r.json") == 0  # fmt: skip
    found = json.loads((folder / "r.json").read_text())["queries"]
    expected = {"R-precision": [0.5, 0.5, 1], "MRR": [1, 0.5, 1], "top-1": [1, 0, 1],
                "recall@1": [0.5, 0, 0.5], "recall@2": [0.5, 0.5, 1]}  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, err_msg=name)
    assert "recall@2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lds", "nowhere"], "cannot read|has no|nowhere"),
        (["lds", "scores", "--bank", "scores"], "expected a folder that jhessians evaluate bank"),
        (["lds", "few", "--bank", "bank"], "scores of 4 documents for 3 queries; expected the 12"),
        (["lds", "part", "--bank", "bank"], "lacks the scores of some documents"),
        (["lds", "scores", "--bank", "odd"], "is damaged"),
        (["lds", "scores", "--bank", "cut"], "cut is damaged: losses.npy has another size"),
        (["lds", "scores", "--bank", "bank", "--json", "taken"], "taken exists already"),
        (["lds", "scores", "--bank", "bank", "--overwrite"], "--overwrite is given without --json"),
        (["recall", "scores"], "name the queries' data set with --query"),
        (["recall", "scores", "--query", "q.jsonl"], "no column 'supporting'"),
        (["recall", "scores", "--query", "q.jsonl", "--relevant", "bad"], "expected a list of row"),
        (["recall", "scores", "--recall_at", "0"], "--recall_at takes whole numbers above 0"),
        (["removal", "scores", "--bank", "bank", "--remove", "12"], "--remove 12 leaves nothing"),
        (
            ["removal", "scores", "--bank", "bank", "--remove", "1", "--queries", "9"],
            "--queries 9 is more",
        ),
        (["bank", "new", "--query", "q.jsonl"], "--query is given without --model_config"),
        (["bank", "new", "--share", "1"], "--share 1 leaves no subset to draw"),
        (["baseline", "new", "--like", "scores"], "config.yaml"),
        (["recal", "scores"], "unknown command 'evaluate recal'; did you mean evaluate recall"),
    ],
)
def test_bad_input_gets_one_line(made, monkeypatch, capsys, words, line):
    folder, scores, _ = made
    monkeypatch.chdir(folder)
    write_scores(folder / "few", scores[:4])
    write_scores(folder / "part", scores, candidates=np.arange(DOCUMENTS))
    shutil.copytree(folder / "bank", folder / "odd")
    np.save(folder / "odd" / "whole.npy", np.zeros(7, np.float32))
    shutil.copytree(folder / "bank", folder / "cut")
    os.truncate(folder / "cut" / "losses.npy", 200)
    (folder / "taken").write_text("mine")
    rows = [{"text": "x", "bad": [DOCUMENTS]}] * QUERIES
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("evaluate", *words) in (1, 2)
    said = [each for each in capsys.readouterr().err.splitlines() if "error:" in each]
    assert len(said) == 1 and re.search(line, said[0]), said
    assert (folder / "taken").read_text() == "mine" and not (folder / "new").exists()


def test_help_lists_the_commands(capsys):
    assert run("evaluate") == 0
    shown = capsys.readouterr().out
    for name in ("recall", "lds", "removal", "bank", "baseline"):
        assert re.search(rf"^  {name} ", shown, re.M)
        assert run("evaluate", name, "--help") == 0
    assert "evaluate    measure" in (run("--help"), capsys.readouterr().out)[1]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank") / "bank"
    assert run("evaluate", "bank", folder, *SMALL) == 0
    return folder


def test_a_bank_from_end_to_end(bank, tmp_path, capsys):
    """The baseline's scores fit it; models without documents lose more when they matter."""
    found = Bank.load(bank)
    documents = found.subsets.shape[1]
    assert found.losses.shape == (3, 200) and (found.subsets.sum(1) == documents // 2).all()
    assert len(np.unique(found.losses[:, 0])) == 3 and (found.whole > 0).all()
    scores = np.random.default_rng(0).standard_normal((documents, 200)).astype(np.float32)
    write_scores(tmp_path / "scores", scores)
    words = [tmp_path / "scores", "--bank", bank]
    assert run("evaluate", "lds", *words, "--json", tmp_path / "lds.json") == 0
    assert run("evaluate", "removal", *words, "--remove", "1", "20", "--queries", "2",
               "--random", "2", "--json", tmp_path / "removal.json") == 0  # fmt: skip
    rises = json.loads((tmp_path / "removal.json").read_text())["rises"]
    assert [each["removed"] for each in rises] == [1, 20]
    sizes = [np.abs(each["best"] + each["random"]).mean() for each in rises]
    assert 0 < sizes[0] < sizes[1]
    assert "9 models" in capsys.readouterr().out


def test_a_bank_is_that_of_its_options_and_can_be_replayed(bank, tmp_path):
    assert run("evaluate", "bank", tmp_path / "again", "--config", bank, "--quiet") == 0
    for name in ("losses.npy", "subsets.npy", "whole.npy", "model/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (bank / name).read_bytes(), name


def test_scores_of_other_documents_are_refused(bank, tmp_path, capsys):
    assert run("evaluate", "baseline", tmp_path / "bm25", "--quiet") == 0
    assert run("evaluate", "lds", tmp_path / "bm25", "--bank", bank) == 1
    assert "has scores of 954 documents" in capsys.readouterr().err


def test_baselines_are_scores_like_others(tmp_path, capsys):
    bm25, random = tmp_path / "bm25", tmp_path / "random"
    assert run("evaluate", "baseline", bm25, "--quiet") == 0
    assert run("evaluate", "baseline", random, "--baseline", "random", "--like", bm25) == 0
    assert run("evaluate", "recall", bm25, "--json", tmp_path / "bm25.json") == 0
    assert run("evaluate", "recall", random, "--json", tmp_path / "random.json") == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text())["means"]
                     for name in ("bm25", "random"))  # fmt: skip
    assert first["R-precision"]["low"] > 0.7 and second["R-precision"]["high"] < 0.05
    capsys.readouterr()
    assert run("top", bm25, "-n", "1") == 0
    assert "Fenando Jelarbeck was born in Veltastrand" in capsys.readouterr().out


def test_the_demos_bank_is_of_the_demo(tmp_path):
    """It ships with the package, and BM25's scores of the demo fit it."""
    assert run("evaluate", "baseline", tmp_path / "bm25", "--quiet") == 0
    assert run("evaluate", "lds", tmp_path / "bm25", "--json", tmp_path / "lds.json") == 0
    assert 0.2 < json.loads((tmp_path / "lds.json").read_text())["means"]["LDS"]["mean"] < 0.5


def test_a_killed_bank_goes_on(bank, tmp_path):
    out = tmp_path / "bank"
    words = [sys.executable, "-m", "jhessians", "evaluate", "bank", str(out), *SMALL,
             "--checkpoint_minutes", "0.000001"]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    state = out.with_name("bank.part") / ".state"
    deadline = time.monotonic() + 300
    while not list(state.glob("models/*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if not out.exists():  # it may have been faster
        assert run("evaluate", "bank", out, *SMALL, "--resume") == 0
    assert (out / "losses.npy").read_bytes() == (bank / "losses.npy").read_bytes()
