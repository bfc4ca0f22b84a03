"""The oracles of scores against each other: bergson, kronfluence and dense matrices in numpy."""

import json

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from transformers import AutoTokenizer

from tests.oracles import bergson, capture, checkpoints, dense_scores
from tests.oracles import bergson_scores as by_bergson
from tests.oracles.bergson_scores import Columns, Projection
from tests.oracles.kronfluence_scores import Kronfluence
from tests.tolerances import BERGSON_SCORES, ORACLE_AGREEMENT

SIZES = {
    "llama": {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2,
              "num_key_value_heads": 1},
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2},
}  # fmt: skip
INVERSIONS = ["damped_inverse", "absolute_damped_inverse", "tikhonov_filtered", "pseudoinverse"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def error(found, expected) -> float:
    """Largest difference over largest expected value; documents without a score must have none."""
    assert found.shape == expected.shape
    unwritten = np.isnan(found)
    assert not expected[unwritten].any()
    return float(np.nanmax(np.abs(found - expected)) / np.abs(expected).max())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module", params=SIZES)
def family(request):
    return request.param


class Case:
    """A tiny model, documents of which one is a single token, and queries."""

    def __init__(self, family, folder):
        self.folder = checkpoints.build(family, folder, seed=1, **SIZES[family])
        self.data = checkpoints.corpus(self.folder, 12)
        lengths = (8, 30, 17)
        self.queries = checkpoints.corpus(
            self.folder, 3, seed=7, lengths=lengths, name="query.jsonl"
        )
        self.tokens, self.query_tokens = (
            checkpoints.encode(self.folder, data, max_length=128)
            for data in (self.data, self.queries)
        )

    def gradients(self, **options):
        options = {"include_bias": True, **options}
        return dense_scores.gradients(self.folder, self.tokens, **options)

    def query_gradients(self):
        return dense_scores.gradients(self.folder, self.query_tokens, include_bias=True)

    def fit(self):
        return bergson.fit(self.folder, self.data, include_bias=True)

    def bergson(self, hessian, **options):
        options = {"include_bias": True, **options}
        return by_bergson.scores(self.folder, self.data, self.queries, hessian, **options)


@pytest.fixture(scope="module")
def case(family, tmp_path_factory):
    return Case(family, tmp_path_factory.mktemp("scores") / family)


def inverses(case, *, ev_correction=True, **options):
    factors = bergson.read(case.fit())
    hessians = dense_scores.factored_hessians(factors, ev_correction=ev_correction)
    return {name: dense_scores.inverse_of(each, **options) for name, each in hessians.items()}


@pytest.mark.parametrize("ev_correction", [True, False])
@pytest.mark.parametrize("inversion", INVERSIONS)
def test_bergson_scores_by_the_dense_inverse(case, inversion, ev_correction):
    options = {"inversion": inversion, "ev_correction": ev_correction, "damping_factor": 0.03}
    found = case.bergson(case.fit(), **options)
    expected = dense_scores.scores(
        case.gradients(), case.query_gradients(), inverses(case, **options)
    )
    assert error(found, expected) < BERGSON_SCORES
    options["ev_correction"] = not ev_correction
    assert error(case.bergson(case.fit(), **options), expected) > 1e-3


def test_bergson_splits_the_damping_over_the_factors(case):
    options = {"inversion": "factored_tikhonov", "ev_correction": False}
    split = dense_scores.factored_tikhonov(bergson.read(case.fit()))
    expected = dense_scores.scores(case.gradients(), case.query_gradients(), split)
    assert error(case.bergson(case.fit(), **options), expected) < BERGSON_SCORES


@pytest.mark.parametrize("aggregation", ["none", "mean", "sum"])
@pytest.mark.parametrize("hessian", [True, False])
def test_bergson_aggregates_queries(case, hessian, aggregation):
    found = case.bergson(case.fit() if hessian else None, aggregation=aggregation)
    expected = dense_scores.scores(
        case.gradients(),
        case.query_gradients(),
        inverses(case) if hessian else None,
        aggregation=aggregation,
    )
    assert error(found, expected) < BERGSON_SCORES


@pytest.mark.parametrize("aggregation", ["none", "mean"])
@pytest.mark.parametrize("hessian", [True, False])
def test_bergson_normalizes_both_sides(case, hessian, aggregation):
    found = case.bergson(
        case.fit() if hessian else None, unit_normalize=True, aggregation=aggregation
    )
    expected = dense_scores.cosines(
        case.gradients(),
        case.query_gradients(),
        inverses(case, half=True) if hessian else None,
        aggregation=aggregation,
    )
    assert error(found, expected) < BERGSON_SCORES
    if aggregation == "none":
        assert np.nanmax(np.abs(found)) <= 1


def test_bergsons_token_scores_add_up(case):
    found = case.bergson(case.fit(), attribute_tokens=True)
    each = case.gradients(per_token=True)
    expected = dense_scores.scores(each, case.query_gradients(), inverses(case))
    assert error(found, expected) < BERGSON_SCORES
    starts = np.cumsum([0, *(len(tokens) - 1 for tokens in case.tokens)])
    sums = np.stack([found[a:b].sum(axis=0) for a, b in zip(starts[:-1], starts[1:], strict=True)])
    assert error(case.bergson(case.fit()), sums) < BERGSON_SCORES


def test_bergsons_pipeline_gives_the_same_scores(case, tmp_path):
    for aggregation in ("none", "mean"):
        piped = bergson.ekfac_scores(
            tmp_path / aggregation,
            case.folder,
            case.data,
            case.queries,
            include_bias=True,
            aggregation=aggregation,
        )
        assert error(case.bergson(case.fit(), aggregation=aggregation), piped) < BERGSON_SCORES


def projected(gradients, projection):
    """Gradients projected by bergson's own matrices: module → [n, p, p], or one sum of [n, p]."""
    from bergson.collector import collector

    if projection.target == "global":
        name = collector.HookCollectorBase.projection_identifier
        parts = [
            collector.project_global(
                name(module, "single", projection.seed),
                torch.from_numpy(each.reshape(len(each), -1)),
                projection.dimension, projection.kind, projection.scale,
            )
            for module, each in gradients.items()
        ]  # fmt: skip
        return {"joint": sum(parts).numpy()}

    def matrix(module, side, size):
        return collector.create_module_projection_matrix(
            module, side, projection.dimension, size, torch.float64, torch.device("cpu"),
            projection.kind, projection.scale, projection.seed,
        ).numpy()  # fmt: skip

    return {
        module: matrix(module, "left", each.shape[1])
        @ each
        @ matrix(module, "right", each.shape[2]).T
        for module, each in gradients.items()
    }


@pytest.mark.parametrize(
    "projection",
    [
        Projection(4),
        Projection(3, kind="normal", scale="row_norm", seed=5),
        Projection(6, target="global"),
    ],
)
def test_bergson_scores_by_the_autocorrelation(case, projection):
    hessian = bergson.fit(
        case.folder, case.data, method="autocorrelation", ev_correction=False,
        include_bias=True, extra=projection.flags,
    )  # fmt: skip
    documents, queries = (
        projected(each, projection) for each in (case.gradients(), case.query_gradients())
    )
    matrices = dense_scores.autocorrelations(documents, len(case.tokens))
    for unit_normalize in (False, True):
        inverted = {
            name: dense_scores.inverse_of(each, half=unit_normalize)
            for name, each in matrices.items()
        }
        expected = (dense_scores.cosines if unit_normalize else dense_scores.scores)(
            documents, queries, inverted
        )
        found = case.bergson(hessian, projection=projection, unit_normalize=unit_normalize)
        assert error(found, expected) < BERGSON_SCORES
    plain = dense_scores.scores(documents, queries, None)
    assert error(case.bergson(None, projection=projection), plain) < BERGSON_SCORES


def test_only_a_completion_has_loss(case, tmp_path):
    settings = case.folder / "tokenizer_config.json"
    original = settings.read_text()
    settings.write_text(json.dumps(json.loads(original) | {"chat_template": TEMPLATE}))
    rows = [{"question": "Where is the ferryman?", "answer": " At the river, as ever."},
            {"question": "Who counts the boats?", "answer": " Nobody counts them."}]  # fmt: skip
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = AutoTokenizer.from_pretrained(case.folder)
    tokens, labels = [], []
    for row in rows:
        encoded = words(row["question"] + row["answer"], add_special_tokens=False)
        first = encoded.char_to_token(len(row["question"]))
        tokens.append(encoded["input_ids"])
        labels.append([-100] * first + encoded["input_ids"][first:])
    try:
        found = by_bergson.scores(
            case.folder, case.data, path, None,
            query_columns=Columns(prompt="question", completion="answer"), include_bias=True,
        )  # fmt: skip
    finally:
        settings.write_text(original)
    queries = dense_scores.gradients(case.folder, tokens, labels, include_bias=True)
    expected = dense_scores.scores(case.gradients(), queries, None)
    assert error(found, expected) < BERGSON_SCORES


@pytest.fixture(scope="module")
def kronfluence(case):
    return Kronfluence(case.folder, case.tokens)


def test_kronfluence_scores_by_the_dense_inverse(case, kronfluence):
    hessians = dense_scores.factored_hessians(kronfluence.factors(), ev_correction=True)
    inverted = {name: dense_scores.inverse_of(each) for name, each in hessians.items()}
    documents, queries = case.gradients(), case.query_gradients()
    found = kronfluence.pairwise(case.tokens, case.query_tokens)
    assert error(found, dense_scores.scores(documents, queries, inverted)) < ORACLE_AGREEMENT
    own = kronfluence.self_scores(case.tokens)
    assert error(own, dense_scores.self_influence(documents, inverted)) < ORACLE_AGREEMENT
    absolute = {
        name: dense_scores.inverse_of(
            each, inversion="absolute_damped_inverse", damping_factor=1e-3
        )
        for name, each in hessians.items()
    }
    found = kronfluence.pairwise(case.tokens, case.query_tokens, absolute_damping=1e-3)
    assert error(found, dense_scores.scores(documents, queries, absolute)) < ORACLE_AGREEMENT


def test_kronfluence_scores_tokens(case, kronfluence):
    hessians = dense_scores.factored_hessians(kronfluence.factors(), ev_correction=True)
    inverted = {name: dense_scores.inverse_of(each) for name, each in hessians.items()}
    short = case.tokens[1:4]
    found = kronfluence.pairwise(short, case.query_tokens, per_token=True)
    each = dense_scores.gradients(case.folder, short, include_bias=True, per_token=True)
    expected = dense_scores.scores(each, case.query_gradients(), inverted)
    assert error(found, expected) < ORACLE_AGREEMENT


def test_kronfluence_minds_labels(case):
    labels = [[-100] * (len(t) // 2) + t[len(t) // 2 :] for t in case.query_tokens]
    dots = Kronfluence(case.folder, case.tokens[1:3], strategy="identity")
    found = dots.pairwise(case.tokens, case.query_tokens, query_label_lists=labels)
    queries = dense_scores.gradients(case.folder, case.query_tokens, labels, include_bias=True)
    expected = dense_scores.scores(case.gradients(), queries, None)
    assert error(found, expected) < ORACLE_AGREEMENT


def test_bergson_scores_with_kronfluences_factors(case, kronfluence, tmp_path):
    hessian = kronfluence.write(tmp_path / "hessian")
    found, own = bergson.read(hessian), bergson.read(case.fit())
    assert found["total_processed"] == own["total_processed"]
    # bergson rounds the documents' share of the positions to float32.
    for folder in ("activation_sharded", "gradient_sharded", "factor_eig_a", "eigenvalue_sharded"):
        for name, expected in own[folder].items():
            assert error(found[folder][name], expected) < BERGSON_SCORES
    expected = kronfluence.pairwise(case.tokens, case.query_tokens)
    assert error(case.bergson(hessian), expected) < BERGSON_SCORES
    # The wrong twin: bergson masks a document's last position and kronfluence on its own does not.
    module = next(iter(own["activation_sharded"]))
    documents = capture.captured(case.folder, case.tokens)[module]
    unmasked = sum(a.T @ a for a, _ in documents)
    size = len(unmasked)
    assert error(unmasked, own["activation_sharded"][module][:size, :size]) > 1e-3
