"""`jhessians score` against torch bergson's build and score, its files, and what it refuses."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from threadpoolctl import threadpool_limits
from transformers import AutoTokenizer

from jhessians.cli.main import main
from jhessians.interop.score_store import ScoreStore
from tests.oracles import bergson, bergson_scores, checkpoints
from tests.oracles.bergson_scores import Columns, Projection
from tests.oracles.kronfluence_scores import Kronfluence
from tests.tolerances import BERGSON_SCORES, SCORES

FLOAT64 = ["--precision", "fp64", "--hessian_dtype", "fp64"]
FAMILIES = ["llama", "gpt_neox", "gpt2"]
TINY = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Case("llama", tmp_path_factory.mktemp("one"))


class Case:
    """A tiny model, documents, queries and our EKFAC of them in float64."""

    def __init__(self, family, folder):
        self.folder = folder
        self.model = checkpoints.build(family, folder / "model", seed=1)
        self.data = checkpoints.corpus(self.model, 12)
        self.queries = checkpoints.corpus(
            self.model, 3, seed=7, lengths=(8, 30, 17), name="query.jsonl"
        )
        self.run = folder / "run"
        assert main(self.fit(self.run, *FLOAT64)) == 0

    def fit(self, run, *more):
        return ["compute", str(run), "--model", str(self.model), "--dataset", str(self.data),
                "--use_dataset_labels", "--truncation", "--token_batch_size", "128", "--quiet",
                "--ev_correction", *more]  # fmt: skip

    def score(self, out, *more, hessian=None):
        """Scores of one command, [row, query]."""
        hessian = self.run if hessian is None else hessian
        query = [] if "--self" in more else ["--query", str(self.queries)]
        words = ["score", str(out), "--hessian", str(hessian), *query, "--quiet", *map(str, more)]
        assert main(words) == 0
        return ScoreStore(out).read_all()


def error(found, expected):
    """Of each query's largest; where bergson wrote nothing there must be zeros."""
    unwritten = np.isnan(expected)
    assert found.shape == expected.shape and not found[unwritten].any()
    return (np.nanmax(np.abs(found - expected), 0) / np.nanmax(np.abs(expected), 0)).max()


@pytest.mark.parametrize(
    ("inversion", "corrected"),
    [("damped_inverse", True), ("tikhonov_filtered", True), ("factored_tikhonov", False)],
)
def test_the_same_scores_as_bergsons(case, tmp_path, inversion, corrected):
    options = {"inversion": inversion, "damping_factor": 0.1, "ev_correction": corrected}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    found = case.score(tmp_path / "scores", *words)
    expected = bergson_scores.scores(case.model, case.data, case.queries, case.run, **options)
    assert error(found, expected) < BERGSON_SCORES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "inversion"),
    [("ekfac", "absolute_damped_inverse"), ("ekfac", "pseudoinverse"),
     ("tkfac", "damped_inverse"), ("shampoo", "damped_inverse"), ("kfac", "damped_inverse")],
)  # fmt: skip
def test_other_methods_and_inversions_are_bergsons_too(llama, tmp_path, method, inversion):
    corrected = method == "ekfac"
    fit = [word for word in llama.fit(tmp_path / "run", *FLOAT64) if word != "--ev_correction"]
    assert main([*fit, "--method", method]) == 0
    found = llama.score(tmp_path / "scores", "--inversion", inversion, "--damping_factor", 0.03,
                        hessian=tmp_path / "run")  # fmt: skip
    expected = bergson_scores.scores(
        llama.model, llama.data, llama.queries, tmp_path / "run", inversion=inversion,
        damping_factor=0.03, ev_correction=corrected,
    )  # fmt: skip
    assert error(found, expected) < BERGSON_SCORES


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gpt_neox"])
def test_kronfluences_pairwise_and_self_scores(family, tmp_path):
    """Both sides fit for themselves."""
    model = checkpoints.build(family, tmp_path / "model", seed=1, **TINY)
    data = checkpoints.corpus(model, 12)
    queries = checkpoints.corpus(model, 3, seed=7, lengths=(8, 30, 17), name="query.jsonl")
    tokens, asked = (checkpoints.encode(model, each, max_length=128) for each in (data, queries))
    run = tmp_path / "run"
    assert main(["compute", str(run), "--model", str(model), "--dataset", str(data), "--method",
                 "ekfac", "--include_bias", "--use_dataset_labels", "--truncation", "--quiet",
                 *FLOAT64]) == 0  # fmt: skip
    words = ["score", str(tmp_path / "s"), "--hessian", str(run), "--query", str(queries)]
    assert main([*words, "--normalize", "self", "--damping_factor", "0.1", "--quiet"]) == 0
    own = np.load(tmp_path / "s" / "self_influence.npy")
    scores = ScoreStore(tmp_path / "s").read_all() * own[:, None]
    with threadpool_limits(1):
        oracle = Kronfluence(model, tokens)
        pairwise, of_self = oracle.pairwise(tokens, asked), oracle.self_scores(tokens)
    assert error(scores, pairwise) < SCORES
    assert error(own[:, None], of_self[:, None]) < SCORES


def test_a_profile_counts_the_arithmetic(llama, tmp_path, capsys):
    words = ["score", tmp_path / "s", "--hessian", llama.run, "--query", llama.queries, "--profile"]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr()
    assert "Cheapest order of products: at 14 modules each document's gradient" in said.err
    assert "GFLOP/s, products of fp64 numbers" in said.out
    stages = json.loads((tmp_path / "s" / "profile.json").read_text())["stages"]
    flop = {stage["name"]: stage["flop"] for stage in stages}
    tokens, asked = (
        [len(each) for each in checkpoints.encode(llama.model, data, max_length=128)]
        for data in (llama.data, llama.queries)
    )
    config = json.loads((llama.model / "config.json").read_text())
    shapes, head = linears_of(config), config["vocab_size"] * config["hidden_size"]
    weights = sum(i * o for i, o in shapes)
    counted = sum(each for each in tokens if each >= 2)
    documents = sum(each >= 2 for each in tokens)
    # Forward and backward, the gradients, and their products with 3 queries.
    expected = counted * (4 * (weights + head) + 2 * weights) + documents * 2 * 3 * weights
    assert flop["Scores"] == expected
    gradients = sum(asked) * (4 * (weights + head) + 2 * weights)
    assert flop["Queries"] > gradients + 3 * sum(2 * i * o * (i + o) for i, o in shapes)


def linears_of(config):
    """(in, out) of every linear of a llama."""
    d, m = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    return [(d, d), (d, kv), (d, kv), (d, d), (d, m), (d, m), (m, d)] * config["num_hidden_layers"]


def test_bergsons_own_hessian_needs_no_import(llama, tmp_path):
    theirs = bergson.fit(llama.model, llama.data)
    found = llama.score(tmp_path / "scores", "--damping_factor", 0.1, hessian=theirs)
    ours = llama.score(tmp_path / "ours", "--damping_factor", 0.1)
    assert error(found, ours) < BERGSON_SCORES


def test_single_precision_ranks_alike(llama, tmp_path):
    assert main(llama.fit(tmp_path / "run")) == 0
    found = llama.score(tmp_path / "scores", "--damping_factor", 0.1, hessian=tmp_path / "run")
    expected = llama.score(tmp_path / "wide", "--damping_factor", 0.1)
    assert error(found, expected) < 1e-4
    for query in range(3):
        ranks = [np.argsort(np.argsort(x[:, query])) for x in (found, expected)]
        assert np.corrcoef(*ranks)[0, 1] >= 0.9999  # Spearman


def test_plain_products_cosines_and_tokens(llama, tmp_path):
    none = ["--model", llama.model, "--dataset", llama.data, "--truncation",
            "--token_batch_size", 128, "--precision", "fp64"]  # fmt: skip
    for name, ours, theirs in (
        ("plain", [], {}),
        ("cosine", ["--unit_normalize"], {"unit_normalize": True}),
        ("tokens", ["--attribute_tokens"], {"attribute_tokens": True}),
    ):
        found = llama.score(tmp_path / name, *none, *ours, hessian="none")
        expected = bergson_scores.scores(llama.model, llama.data, llama.queries, None, **theirs)
        assert error(found, expected) < BERGSON_SCORES, name
    store = ScoreStore(tmp_path / "tokens")
    sums = np.add.reduceat(store.read_all(), store.offsets[:-1][np.diff(store.offsets) > 0])
    plain = ScoreStore(tmp_path / "plain").read_all()
    assert error(sums, plain[np.diff(store.offsets) > 0]) < SCORES


@pytest.mark.parametrize("target", ["per_module", "global"])
def test_autocorrelations_bring_their_projection(llama, tmp_path, capsys, target):
    flags = ["--method", "autocorrelation", "--projection_dim", "4", "--projection_target", target]
    fit = [word for word in llama.fit(tmp_path / "run") if word != "--ev_correction"]
    assert main([*fit, "--precision", "fp64", *flags]) == 0
    found = llama.score(tmp_path / "scores", "--damping_factor", 0.1, hessian=tmp_path / "run")
    expected = bergson_scores.scores(
        llama.model, llama.data, llama.queries, tmp_path / "run",
        ev_correction=False, projection=Projection(4, target=target),
    )  # fmt: skip
    # bergson sums an autocorrelation's inverse in float32, ours reads the same file.
    assert error(found, expected) < 2e-5
    words = ["--hessian", tmp_path / "run", "--query", llama.queries, "--include_bias"]
    assert "was fitted without biases, but --include_bias is true" in refused(
        capsys, tmp_path / "out", *words
    )


def test_completions_are_the_only_targets_of_queries(llama, tmp_path):
    lines = [json.loads(line)["text"] for line in llama.queries.read_text().splitlines()]
    (llama.model / "chat_template.jinja").write_text(TEMPLATE)
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"q": text[: len(text) // 2], "a": text[len(text) // 2 :]} for text in lines]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["score", str(tmp_path / "s"), "--hessian", str(llama.run), "--query", str(pairs),
             "--query_prompt_column", "q", "--query_completion_column", "a", "--quiet",
             "--damping_factor", "0.1"]  # fmt: skip
    assert main(words) == 0
    expected = bergson_scores.scores(
        llama.model, llama.data, pairs, llama.run, query_columns=Columns("q", "a")
    )
    assert error(ScoreStore(tmp_path / "s").read_all(), expected) < BERGSON_SCORES


def test_the_assistants_turns_are_the_only_targets_of_queries(llama, tmp_path, capsys):
    lines = [json.loads(line)["text"] for line in llama.queries.read_text().splitlines()]
    (llama.model / "chat_template.jinja").write_text(TEMPLATE)
    chats = tmp_path / "chats.jsonl"
    # An answer that the user has said before, and two turns: a search for the text would err.
    rows = [[("user", "Say: to be."), ("assistant", "to be."), ("user", lines[0]),
             ("assistant", "They said the river.")],
            [("system", "Be brief."), ("user", "Why?"), ("assistant", "Nobody asks.")]]  # fmt: skip
    messages = [[{"role": role, "content": text} for role, text in row] for row in rows]
    chats.write_text("".join(json.dumps({"chat": each}) + "\n" for each in messages))
    words = [
        "score",
        str(tmp_path / "s"),
        "--hessian",
        str(llama.run),
        "--query",
        str(chats),
        "--query_conversation_column",
        "chat",
        "--quiet",
        "--damping_factor",
        "0.1",
    ]
    assert main(words) == 0
    expected = bergson_scores.scores(
        llama.model, llama.data, chats, llama.run, query_columns=Columns(conversation="chat")
    )
    found = ScoreStore(tmp_path / "s").read_all()
    assert error(found, expected) < BERGSON_SCORES
    # The wrong twin: all of what the template writes.
    tokenizer = AutoTokenizer.from_pretrained(llama.model)
    texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in messages]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    words = ["score", str(tmp_path / "p"), "--hessian", str(llama.run), "--query", str(plain)]
    assert main([*words, "--quiet", "--damping_factor", "0.1"]) == 0
    assert error(ScoreStore(tmp_path / "p").read_all(), expected) > 1e-2

    chats.write_text(json.dumps({"chat": messages[0]}) + "\n" + json.dumps({"chat": [
        {"role": "user", "content": "Nobody answers."}]}) + "\n")  # fmt: skip
    column = ["--query_conversation_column", "chat"]
    query = ["--hessian", llama.run, "--query", chats]
    assert "query 1 (of 2) has no token to predict" in refused(
        capsys, tmp_path / "x", *query, *column
    )
    line = refused(capsys, tmp_path / "x", *query, "--query_conversation_column", "chats")
    assert "the queries: the data set has no column 'chats'" in line
    assert "did you mean --query_conversation_column chat" in line
    assert "exclude each other" in refused(
        capsys, tmp_path / "x", *query, *column, "--query_completion_column", "a"
    )


def test_parts_groups_and_lists_agree_with_the_whole(llama, tmp_path):
    whole = llama.score(tmp_path / "whole")
    grouped = llama.score(tmp_path / "groups", "--query_batch_size", 2)
    np.testing.assert_allclose(grouped, whole, rtol=1e-9, atol=1e-12 * np.abs(whole).max())
    llama.score(tmp_path / "parts", "--by_module", "layer")
    parts = np.load(tmp_path / "parts" / "module_scores.npy")
    names = json.loads((tmp_path / "parts" / "modules.json").read_text())
    assert parts.shape == (*whole.shape, len(names)) and all("layers." in n for n in names)
    assert error(parts.sum(2), whole) < SCORES

    (self_score,) = llama.score(tmp_path / "self", "--self").T
    llama.score(tmp_path / "divided", "--normalize", "self")
    np.testing.assert_allclose(np.load(tmp_path / "divided" / "self_influence.npy"), self_score,
                               rtol=1e-6)  # fmt: skip

    llama.score(tmp_path / "top", "--top", 2)
    store = ScoreStore(tmp_path / "top")
    lines = [json.loads(line) for line in (tmp_path / "top" / "top.jsonl").open()]
    for query in range(3):
        order = np.argsort(-whole[:, query], kind="stable")
        mine = {line["rank"]: line["document"] for line in lines if line["query"] == query}
        assert [mine[1], mine[2], mine[-1]] == [order[0], order[1], order[-1]]
        scores, written = store.read(query)
        kept = store.candidates[written]
        assert written.sum() == 4 and set(kept) == set(mine.values())
        np.testing.assert_allclose(scores[written], whole[kept, query], rtol=1e-6)
    again = llama.score(
        tmp_path / "again", "--candidates", str(tmp_path / "top"), "--top", 1
    )  # fmt: skip
    best = [line for line in (tmp_path / "again" / "top.jsonl").open() if '"rank": 1,' in line]
    assert again.shape[1] == 3
    assert [json.loads(line)["document"] for line in best] == list(whole.argmax(0))


def test_query_tokens_add_up_and_a_replay_repeats(llama, tmp_path):
    whole = llama.score(tmp_path / "whole")
    tokens = llama.score(tmp_path / "tokens", "--query_tokens")
    columns = [json.loads(line) for line in (tmp_path / "tokens" / "columns.jsonl").open()]
    summed = np.stack(
        [tokens[:, [c["column"] for c in columns if c["query"] == q]].sum(1) for q in range(3)], 1
    )
    assert error(summed, whole) < SCORES
    assert main(["score", "--config", str(tmp_path / "whole"), str(tmp_path / "b"), "--quiet"]) == 0
    np.testing.assert_array_equal(ScoreStore(tmp_path / "b").read_all(), whole)
    config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert config["steps"][0]["score"]["score_cfg"]["higher_is_better"] is True


def refused(capsys, *words):
    assert main(["score", *map(str, words)]) != 0
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1
    return said[0]


def test_other_data_than_the_hessians_are_said(llama, tmp_path, capsys):
    other = checkpoints.corpus(llama.model, 4, seed=9, name="other.jsonl")
    words = ["score", tmp_path / "s", "--hessian", llama.run, "--query", llama.queries]
    assert main([str(word) for word in [*words, "--dataset", other]]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"warning: the Hessian was fitted on {llama.data}, not on {other}" in said


def test_bad_input_is_one_line_and_leaves_nothing(llama, tmp_path, capsys, monkeypatch):
    out, query = tmp_path / "out", ["--query", llama.queries]
    hessian = ["--hessian", llama.run]
    assert "is no folder" in refused(capsys, out, "--hessian", tmp_path / "nowhere", *query)
    (tmp_path / "empty").mkdir()
    assert "config.yaml" in refused(capsys, out, "--hessian", tmp_path / "empty", *query)
    assert "--query is missing" in refused(capsys, out, *hessian)
    assert "without --hessian" in refused(capsys, out, "--model", llama.model, *query)
    assert "exclude each other" in refused(
        capsys, out, *hessian, *query, "--normalize", "self", "--unit_normalize"
    )
    assert "leave --query out" in refused(capsys, out, *hessian, *query, "--self")
    assert "is given without --top" in refused(capsys, out, *hessian, *query, "--candidates", out)
    assert "factored_tikhonov" in refused(
        capsys, out, *hessian, *query, "--inversion", "factored_tikhonov", "--ev_correction"
    )
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a b c d"}\n{"text": ""}\n')
    assert "query 1 (of 2) has no token to predict" in refused(
        capsys, out, *hessian, "--query", short
    )
    other = checkpoints.build("gpt2", tmp_path / "other", seed=3)
    assert "no factors for" in refused(capsys, out, *hessian, *query, "--model", other)
    assert not out.exists() and not out.with_name("out.part").exists()
    none = ["--hessian", "none", "--model", llama.model, "--dataset", llama.data, "--truncation"]
    for name, value in (("inversion", "pseudoinverse"), ("damping_factor", 1),
                        ("ev_correction", "false")):  # fmt: skip
        line = refused(capsys, out, *none, *query, f"--{name}", value)
        assert f"--{name} is about a Hessian's inverse, but --hessian is none" in line
    scores = tmp_path / "scores"
    llama.score(scores)
    assert "holds no Hessian, neither" in refused(capsys, out, "--hessian", scores, *query)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    line = refused(capsys, out, *hessian, *query, "--by_module", "module")
    assert "module_scores.npy: the scores need 2.14e-06 GB and the disk has 1e-06 GB" in line
    assert not out.exists() and not out.with_name("out.part").exists()
    shutil.copytree(tmp_path / "empty", out)
    assert "exists already" in refused(capsys, out, *hessian, *query)
