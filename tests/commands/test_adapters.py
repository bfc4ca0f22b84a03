"""Scores and stores of LoRA adapters, whose own linears alone have gradients, against bergson's."""

import numpy as np
import pytest

from jhessians.cli.main import main
from jhessians.interop.gradient_store import GradientStore
from jhessians.interop.low_rank_store import LowRankStore
from jhessians.interop.score_store import ScoreStore
from tests.commands.test_score import error
from tests.oracles import adapters, bergson, bergson_scores, checkpoints
from tests.oracles.bergson_scores import Projection
from tests.small import relative_error
from tests.tolerances import BERGSON_SCORES, FACTORS, ORACLE_AGREEMENT

FAMILIES = ["gpt2", pytest.param("llama", marks=pytest.mark.slow)]
# Llama's norms are computed in float32 by transformers, in float64 runs too.
SAME = {"gpt2": BERGSON_SCORES, "llama": FACTORS}

TINY = {
    "llama": {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2,
              "num_key_value_heads": 1},
    "gpt2": {"n_embd": 16, "n_inner": 24, "n_head": 2},
}  # fmt: skip
LORA = {
    "llama": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"],
              "rank_pattern": {"v_proj": 2}},
    "gpt2": {"r": 4, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"],
             "fan_in_fan_out": True, "use_rslora": True},
}  # fmt: skip
SHARED = ["--truncation", "--token_batch_size", "128", "--precision", "fp64", "--quiet"]


class Case:
    """An adapter of a tiny model, documents and queries."""

    def __init__(self, family, root):
        self.tolerance = SAME[family]
        base = checkpoints.build(family, root / "base", seed=1, **TINY[family])
        self.folder = adapters.build(base, root / "adapter", seed=2, **LORA[family])
        checkpoints.tokenizer(self.folder, add_bos=family == "llama")
        self.data = checkpoints.corpus(self.folder, 12)
        self.queries = checkpoints.corpus(
            self.folder, 3, seed=7, lengths=(8, 30, 17), name="query.jsonl"
        )

    @property
    def words(self):
        return ["--model", str(self.folder), "--dataset", str(self.data), *SHARED]

    def score(self, out, hessian, *more):
        words = ["score", out, "--hessian", hessian, "--query", self.queries, "--quiet", *more]
        assert main([str(word) for word in words]) == 0
        return ScoreStore(out).read_all()

    def bergson(self, hessian, **options):
        return bergson_scores.scores(self.folder, self.data, self.queries, hessian, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def run(case, tmp_path_factory):
    """Our EKFAC of the adapter's linears in float64."""
    run = tmp_path_factory.mktemp("fit") / "run"
    flags = ["--use_dataset_labels", "--ev_correction", "--hessian_dtype", "fp64"]
    assert main(["compute", str(run), *case.words, *flags]) == 0
    return run


def test_an_adapters_scores_are_bergsons(case, run, tmp_path):
    found = case.score(tmp_path / "s", run, "--damping_factor", 0.1)
    expected = case.bergson(run)
    assert error(found, expected) < case.tolerance
    parts = case.score(tmp_path / "parts", run, "--damping_factor", 0.1, "--by_module", "module",
                       "--modules", "*.lora_B.default")  # fmt: skip
    assert error(parts, expected) > 1e-3  # those of B's alone are others
    assert "lora_A" not in (tmp_path / "parts" / "modules.json").read_text()


@pytest.mark.slow
def test_plain_products_and_tokens_of_an_adapter(case, tmp_path):
    for name, ours, theirs in (
        ("plain", [], {}), ("tokens", ["--attribute_tokens"], {"attribute_tokens": True}),
    ):  # fmt: skip
        found = case.score(tmp_path / name, "none", *case.words, *ours)
        assert error(found, case.bergson(None, **theirs)) < case.tolerance, name


@pytest.mark.slow
def test_an_adapters_autocorrelation_scores(case, tmp_path):
    flags = ["--method", "autocorrelation", "--projection_dim", "3"]
    assert main(["compute", str(tmp_path / "run"), *case.words, *flags]) == 0
    found = case.score(tmp_path / "s", tmp_path / "run", "--damping_factor", 0.1)
    expected = case.bergson(tmp_path / "run", ev_correction=False, projection=Projection(3))
    assert error(found, expected) < 2e-5  # bergson sums an autocorrelation's inverse in float32


STORES = {
    "whole": {},
    "projected": {"projection_dim": 3},
    "global": {"projection_dim": 6, "projection_target": "global"},
    "tokens": {"projection_dim": 3, "attribute_tokens": True},
    "unit": {"unit_normalize": True},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "tokens" else pytest.mark.slow) for name in STORES],
)
def test_an_adapters_store_is_bergsons(case, tmp_path, name):
    options = STORES[name]
    words = [w for name, value in options.items() for w in (f"--{name}", str(value).lower())]
    assert main(["build", str(tmp_path / "run"), *case.words, *words]) == 0
    reference = bergson.build(case.folder, case.data, **options)
    found, expected = GradientStore(tmp_path / "run"), GradientStore(reference)
    assert list(found.sizes.items()) == list(expected.sizes.items())
    assert np.abs(expected.matrix).max() > 0
    assert relative_error(found.matrix, expected.matrix) < FACTORS
    assert (tmp_path / "run" / "info.json").read_text() == (reference / "info.json").read_text()


@pytest.mark.slow
def test_a_store_of_an_adapter_is_preconditioned(case, run, tmp_path):
    """Scores are products of the queries through the inverse and of the documents."""
    for name, data in (("q", case.queries), ("d", case.data)):
        words = ["--model", str(case.folder), "--dataset", str(data), *SHARED]
        assert main(["build", str(tmp_path / name), *words]) == 0
    words = ["--hessian", str(run), "--gradients", str(tmp_path / "q"), "--precision", "fp64",
             "--damping_factor", "0.1", "--quiet"]  # fmt: skip
    assert main(["apply", str(tmp_path / "p"), *words]) == 0
    queries, documents = GradientStore(tmp_path / "p"), GradientStore(tmp_path / "d")
    assert list(queries.sizes) == list(documents.sizes)
    expected = case.score(tmp_path / "s", run, "--damping_factor", 0.1)
    assert error(documents.matrix @ queries.matrix.T, expected) < BERGSON_SCORES


@pytest.mark.slow
def test_outer_products_of_an_adapter_lose_nothing_at_its_rank(case, tmp_path):
    """A's gradient has `r` rows and B's `r` columns, so that rank 4 is all of it."""
    assert main(["build", str(tmp_path / "whole"), *case.words]) == 0
    assert main(["build", str(tmp_path / "low"), *case.words, "--rank", "4"]) == 0
    store, whole = LowRankStore(tmp_path / "low"), GradientStore(tmp_path / "whole")
    assert list(store.shapes) == list(whole.sizes)
    for name in store.shapes:
        g, a = store.factors(name)
        found = np.einsum("nro,nri->noi", g, a).reshape(len(g), -1)
        assert relative_error(found, whole.module(name)) < ORACLE_AGREEMENT
