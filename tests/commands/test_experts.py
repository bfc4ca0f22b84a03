"""Scores and stores with a mixture's experts, which read some tokens each, against bergson's."""

import numpy as np
import pytest

from jhessians.cli.main import main
from jhessians.interop.gradient_store import GradientStore
from jhessians.interop.low_rank_store import LowRankStore
from jhessians.interop.score_store import ScoreStore
from tests.commands.test_score import error
from tests.oracles import bergson, bergson_scores, checkpoints
from tests.small import relative_error
from tests.tolerances import FACTORS

GLOB = "model.layers.*.mlp.experts"
SIZES = {
    "hidden_size": 12, "intermediate_size": 10, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 6, "num_local_experts": 4, "num_hidden_layers": 2,
}  # fmt: skip
NAMES = {f"layers.{n}.mlp.experts.expert_{e}.gate_up_proj" for n in range(2) for e in range(4)}
OTHERS = "*.self_attn.*"  # to leave out


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = checkpoints.build("mixtral", tmp_path_factory.mktemp("models"), seed=1, **SIZES)
    checkpoints.corpus(folder, 12, lengths=(2, 40, 9, 1, 25, 3, 60))
    checkpoints.corpus(folder, 3, seed=7, lengths=(8, 30, 17), name="query.jsonl")
    return folder


def words(folder, *more):
    return ["--model", str(folder), "--dataset", str(folder / "docs.jsonl"), "--truncation",
            "--token_batch_size", "128", "--precision", "fp64", "--moe_experts", GLOB, "--quiet",
            *more]  # fmt: skip


STORES = {
    "whole": {"filter_modules": OTHERS},
    "projected": {"projection_dim": 3},
    "global": {"projection_dim": 6, "projection_target": "global"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "projected" else pytest.mark.slow) for n in STORES]
)
def test_a_store_with_experts_is_bergsons(mixtral, tmp_path, name):
    options = STORES[name]
    flags = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    assert main(["build", str(tmp_path / "run"), *words(mixtral, *flags)]) == 0
    reference = bergson.build(mixtral, mixtral / "docs.jsonl", moe_experts=GLOB, **options)
    found, expected = GradientStore(tmp_path / "run"), GradientStore(reference)
    assert list(found.sizes.items()) == list(expected.sizes.items())
    assert name == "global" or set(expected.sizes) >= NAMES
    assert relative_error(found.matrix, expected.matrix) < FACTORS
    assert (tmp_path / "run" / "info.json").read_text() == (reference / "info.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("hessian", [True, False])
def test_scores_with_experts_are_bergsons(mixtral, tmp_path, hessian):
    run, given = None, words(mixtral)
    if hessian:
        run, given = tmp_path / "run", ["--damping_factor", "0.1", "--quiet"]
        flags = ["--use_dataset_labels", "--ev_correction", "--hessian_dtype", "fp64"]
        assert main(["compute", str(run), *words(mixtral, *flags)]) == 0
    query = ["--query", str(mixtral / "query.jsonl")]
    given += ["--hessian", str(run or "none")]
    assert main(["score", str(tmp_path / "s"), *query, *given]) == 0
    expected = bergson_scores.scores(
        mixtral, mixtral / "docs.jsonl", mixtral / "query.jsonl", run,
        extra=["--moe_experts", GLOB],
    )  # fmt: skip
    assert error(ScoreStore(tmp_path / "s").read_all(), expected) < FACTORS


@pytest.mark.slow
def test_outer_products_of_experts(mixtral, tmp_path):
    """Of enough rank they are all of the gradient."""
    flags = ["--filter_modules", OTHERS]
    assert main(["build", str(tmp_path / "whole"), *words(mixtral, *flags)]) == 0
    assert main(["build", str(tmp_path / "low"), *words(mixtral, *flags, "--rank", "12")]) == 0
    store, whole = LowRankStore(tmp_path / "low"), GradientStore(tmp_path / "whole")
    assert list(store.shapes) == list(whole.sizes) and set(whole.sizes) >= NAMES
    for name in store.shapes:
        g, a = store.factors(name)
        found = np.einsum("nro,nri->noi", g, a).reshape(len(g), -1)
        assert relative_error(found, whole.module(name)) < FACTORS


@pytest.mark.slow
def test_devices_and_batches_change_nothing(mixtral, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    assert main(["build", str(one), *words(mixtral, "--world_size", "1")]) == 0
    flags = ["--world_size", "8", "--max_batch_size", "1", "--fsdp"]
    assert main(["build", str(many), *words(mixtral, *flags)]) == 0
    found, expected = GradientStore(many), GradientStore(one)
    assert relative_error(found.matrix, expected.matrix) < 1e-12  # float64 on both sides
