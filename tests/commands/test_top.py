"""`jhessians top`: lists, whole rankings beyond them, and texts of data that may have changed."""

import json
import shutil

import numpy as np
import pytest

from jhessians.cli.main import main
from jhessians.interop.score_store import ScoreStore
from tests.oracles import checkpoints

COUNT = 60  # more than two lists have
TINY = {"n_embd": 16, "n_inner": 24, "n_head": 2, "n_layer": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("top")
    folder = checkpoints.build("gpt2", root / "model", seed=1, **TINY)
    checkpoints.corpus(folder, COUNT, lengths=(5, 9, 13, 1))
    checkpoints.corpus(folder, 2, seed=7, lengths=(8, 17), name="query.jsonl")
    scored(folder, "scores")
    return folder


def scored(model, name, *more):
    out = model.parent / name
    words = ["--hessian", "none", "--model", model, "--dataset", model / "docs.jsonl", "--query",
             model / "query.jsonl", "--world_size", "1", "--quiet", *more]  # fmt: skip
    assert main(["score", *map(str, [out, *words])]) == 0
    return out


def places(text):
    """Rank, score, number and text of each line."""
    found = []
    for line in text.splitlines():
        rank, score, rest = line.split(maxsplit=2) if line.startswith("    ") else ("", "", "")
        if rank:
            number, *words = rest.split(maxsplit=1)
            found.append((int(rank), float(score), int(number.removeprefix("#")), "".join(words)))
    return found


def top(capsys, folder, *words):
    capsys.readouterr()
    assert main(["top", str(folder), *map(str, words)]) == 0
    return capsys.readouterr().out


def texts_of(model):
    lines = (model / "docs.jsonl").read_text().splitlines()
    texts = (" ".join(json.loads(line)["text"].split()) for line in lines)
    return ["".join(c if c.isprintable() else "�" for c in text) for text in texts]


def test_a_ranking_goes_on_where_the_list_ends(model, capsys):
    scores, texts = ScoreStore(model.parent / "scores").read_all()[:, 1], texts_of(model)
    order = np.argsort(-scores, kind="stable")
    for count, best, worst in ((3, 3, 3), (20, 20, 20), (27, 27, 27), (40, 40, 20), (99, COUNT, 0)):
        said = top(capsys, model.parent / "scores", "--query", 1, "-n", count)
        found = places(said)
        assert [rank for rank, *_ in found] == [*range(1, best + 1), *range(-worst, 0)]
        assert [number for _, _, number, _ in found] == [*order[:best], *order[COUNT - worst :]]
        for _, score, number, text in found:
            assert score == pytest.approx(scores[number], rel=1e-3)
            beginning = text.removesuffix("…").strip()
            assert texts[number].startswith(beginning) and (beginning or not texts[number])
        assert "without texts" not in said


@pytest.mark.parametrize("how", ["changed", "shorter", "gone"])
def test_texts_are_only_shown_of_what_was_scored(model, tmp_path, capsys, how):
    shutil.copytree(model, tmp_path / "model")
    data = tmp_path / "model" / "docs.jsonl"
    out = scored(tmp_path / "model", "scores")
    whole = places(top(capsys, out, "-n", 99))
    lines = data.read_text().splitlines(keepends=True)
    if how == "gone":
        data.unlink()
    else:
        data.write_text("".join(lines[:-1] if how == "shorter" else [*lines[:-1], lines[0]]))
    said = top(capsys, out, "-n", 99)
    reason = "docs.jsonl" if how == "gone" else "is not what was scored: it changed since"
    assert reason in said and "documents are shown without texts" in said
    found = places(said)
    assert [each[:3] for each in found] == [each[:3] for each in whole]
    listed = [json.loads(line)["document"] for line in (out / "top.jsonl").open()]
    for mine, before in zip(found, whole, strict=True):
        assert mine[3] == (before[3] if mine[2] in listed else "")
    if how == "gone":  # what is listed needs no data
        assert "without texts" not in top(capsys, out, "-n", 20)


def test_scores_of_tokens_are_added_up_and_short_lists_told(model, capsys):
    whole = places(top(capsys, model.parent / "scores", "-n", 25))
    tokens = places(top(capsys, scored(model, "tokens", "--attribute_tokens"), "-n", 25))
    assert [each[2] for each in tokens] == [each[2] for each in whole]
    said = top(capsys, scored(model, "few", "--top", 2), "-n", 5)
    assert [each[0] for each in places(said)] == [1, 2, -2, -1]
    assert "holds 2 documents at either end, as --top said" in said


def test_what_is_no_result_is_refused(model, tmp_path, capsys):
    def refused(folder, *words):
        capsys.readouterr()
        assert main(["top", str(folder), *words]) != 0
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("jhessians: error") == 1
        return said.err

    assert "finished run of jhessians score" in refused(tmp_path)
    assert "give 0 to 1" in refused(model.parent / "scores", "--query", "2")
    for name, content, word in (
        ("top.jsonl", '{"query": 0}\n', "top.jsonl is damaged"),
        ("top.jsonl", "[" * 100_000, "top.jsonl is damaged"),
        ("columns.jsonl", "3\n", "columns.jsonl is damaged"),
        ("scores.bin", "", "scores.bin has 0 bytes"),
    ):
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(model.parent / "scores", copy)
        (copy / name).write_text(content)
        (copy / "manifest.json").unlink()  # which would say so first
        assert word in refused(copy, "-n", "25")
