"""The oracles against each other: bergson, plain torch hooks and numpy must tell one story."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from transformers import AutoModelForCausalLM

from tests.oracles import bergson, bergson_session, capture, checkpoints, kfac_numpy
from tests.oracles.families import FAMILIES
from tests.tolerances import DAMPED_INVERSE, INVARIANCE, ORACLE_AGREEMENT, SCORE_CORRELATION

DAMPING = 0.1
DOCUMENTS = 23
EIGENVECTORS = ("eigen_activation_sharded", "eigen_gradient_sharded")


def error(found, expected) -> float:
    """Largest difference over largest expected value; over every module of a folder."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        return max(error(found[name], expected[name]) for name in expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Matrices of a hundred rows: a second thread mostly spins, the more so on a busy machine.
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("oracles")
    folders = {family: checkpoints.build(family, root / family, seed=1) for family in FAMILIES}
    for folder in folders.values():
        checkpoints.corpus(folder, DOCUMENTS)
        checkpoints.corpus(folder, 5, seed=7, lengths=(8, 30, 2, 17), name="query.jsonl")
    return folders


def documents_of(folder, name="docs.jsonl", *, include_bias=False, **options):
    tokens = checkpoints.encode(folder, folder / name, max_length=128)
    documents = capture.captured(folder, tokens, **options)
    if include_bias:
        biased = capture.has_bias(folder)
        documents = {
            module: kfac_numpy.with_bias(listed) if biased[module] else listed
            for module, listed in documents.items()
        }
    return documents


def assert_same_story(fitted, documents, n_docs):
    """Every folder of a bergson fit agrees with numpy, eigenvectors up to what defines them."""
    expected = kfac_numpy.factored_hessian(documents, n_docs)
    for folder in set(expected) - set(EIGENVECTORS) - {"eigenvalue_correction_sharded"}:
        assert error(fitted[folder], expected[folder]) < ORACLE_AGREEMENT, folder
    for module, listed in documents.items():
        activation, gradient, count = kfac_numpy.covariances(listed)
        q_a, q_s = (fitted[folder][module] for folder in EIGENVECTORS)
        scale = np.sqrt(count / n_docs) / count
        for q, values, covariance in (
            (q_a, fitted["factor_eig_a"][module], activation),
            (q_s, fitted["factor_eig_g"][module], gradient),
        ):
            assert (np.diff(values) >= 0).all()
            assert error((q * values) @ q.T, covariance * scale) < ORACLE_AGREEMENT, module
        correction = kfac_numpy.eigenvalue_correction(listed, q_s, q_a, n_docs)
        found = fitted["eigenvalue_correction_sharded"][module]
        assert error(found, correction) < ORACLE_AGREEMENT, module


@pytest.mark.parametrize("include_bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_bergson_and_numpy_tell_one_story(models, family, include_bias):
    folder = models[family]
    documents = documents_of(folder, include_bias=include_bias)
    fitted = bergson.read(bergson.fit(folder, folder / "docs.jsonl", include_bias=include_bias))
    assert_same_story(fitted, documents, DOCUMENTS)
    lengths = [len(a) for a, _ in next(iter(documents.values()))]
    assert min(lengths) == 1 and fitted["total_processed"] == sum(n - 1 for n in lengths)


def test_labels_choose_the_loss_and_not_the_positions(models, tmp_path):
    folder = models["gpt_neox"]
    tokens = checkpoints.encode(folder, folder / "docs.jsonl", max_length=128)
    # A prompt without loss, whose positions carry gradient all the same.
    labels = [[-100] * (len(t) // 2) + t[len(t) // 2 :] for t in tokens]
    data = checkpoints.write_tokens(tmp_path / "labelled.jsonl", tokens, labels)
    fitted = bergson.read(bergson.fit(folder, data, loss_reduction="mean"))
    documents = capture.captured(folder, tokens, labels, loss_reduction="mean")
    assert_same_story(fitted, documents, DOCUMENTS)
    assert fitted["total_processed"] == sum(len(t) - 1 for t in tokens)
    # The wrong twin: a mask of labelled positions only.
    module = "layers.0.mlp.dense_h_to_4h"
    masks = [np.array([*(label != -100 for label in row[1:]), False]) for row in labels]
    wrong, _, _ = kfac_numpy.covariances(documents[module], masks)
    assert error(wrong, fitted["activation_sharded"][module]) > 1e-2


def assert_same_files(found, expected, tolerance):
    for folder in set(expected) - {"total_processed"}:
        assert error(found[folder], expected[folder]) < tolerance, folder
    assert found["total_processed"] == expected["total_processed"]


def test_ranks_agree_with_one_process(models):
    folder = models["gpt2"]
    one = bergson.fit(folder, folder / "docs.jsonl")
    three = bergson.fit(folder, folder / "docs.jsonl", processes=3)
    assert len(list((three / "factor_eig_a").iterdir())) == 3
    assert_same_files(bergson.read(three), bergson.read(one), INVARIANCE)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_driver_repeats_the_command_line(models, tmp_path, processes):
    folder = models["gpt2"]
    driven = bergson.fit(folder, folder / "docs.jsonl", processes=processes)
    subprocess.run(
        [
            *(sys.executable, "-m", "bergson", "hessian", tmp_path / "run", "--method", "kfac"),
            *("--ev_correction", "--use_dataset_labels", "--model", folder, "--truncation"),
            *("--dataset", folder / "docs.jsonl", "--token_batch_size", "128"),
            *("--precision", "fp64", "--hessian_dtype", "fp64"),
            *("--nproc_per_node", str(processes)),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert_same_files(bergson.read(tmp_path / "run"), bergson.read(driven), ORACLE_AGREEMENT)


@pytest.mark.parametrize("ev_correction", [True, False])
def test_consumers_apply_the_damped_inverse(models, ev_correction):
    folder = models["gpt2"]
    one = bergson.fit(folder, folder / "docs.jsonl")
    three = bergson.fit(folder, folder / "docs.jsonl", processes=3)
    fitted = bergson.read(one)
    eigenvalues = fitted[f"eigenvalue_{'correction_' * ev_correction}sharded"]
    rng = np.random.default_rng(0)
    gradients = {name: rng.standard_normal((2, *v.shape)) for name, v in eigenvalues.items()}
    expected = {
        name: kfac_numpy.apply_damped_inverse(
            gradient,
            fitted["eigen_gradient_sharded"][name],
            fitted["eigen_activation_sharded"][name],
            eigenvalues[name],
            DAMPING,
        )
        for name, gradient in gradients.items()
    }
    gradients["unknown"] = expected["unknown"] = rng.standard_normal((1, 2, 3))
    options = {"ev_correction": ev_correction, "damping_factor": DAMPING}
    for found in (
        bergson.consume_from_path(one, gradients, **options),
        bergson.consume_from_path(three, gradients, **options),
        bergson.consume_from_shards(three, gradients, processes=3, **options),
    ):
        assert error(found, expected) < DAMPED_INVERSE / 100
    wrong = bergson.consume_from_path(one, gradients, ev_correction=not ev_correction)
    del wrong["unknown"], expected["unknown"]
    assert error(wrong, expected) > 10 * DAMPED_INVERSE


def test_ekfac_uses_the_factors_it_is_given(models, tmp_path):
    folder = models["gpt2"]
    data, queries = folder / "docs.jsonl", folder / "query.jsonl"
    options = {"include_bias": True, "damping_factor": DAMPING}
    own = bergson.ekfac_scores(tmp_path / "own", folder, data, queries, **options)
    expected = np.zeros_like(own)
    documents = documents_of(folder, include_bias=True)
    query_documents = documents_of(folder, "query.jsonl", include_bias=True)
    fitted = bergson.fit(folder, data, include_bias=True, processes=3)
    run = tmp_path / "given"
    shutil.copytree(fitted, run / "hessian" / "kfac")
    given = bergson.ekfac_scores(run, folder, data, queries, processes=3, **options)
    assert error(given, own) < DAMPED_INVERSE / 100
    factors = bergson.read(fitted)
    for module, listed in documents.items():
        gradients, query = (
            np.stack([kfac_numpy.weight_gradient(document) for document in group])
            for group in (listed, query_documents[module])
        )
        applied = kfac_numpy.apply_damped_inverse(
            query,
            factors["eigen_gradient_sharded"][module],
            factors["eigen_activation_sharded"][module],
            factors["eigenvalue_correction_sharded"][module],
            DAMPING,
        )
        expected += np.einsum("doi,qoi->dq", gradients, applied)
    assert own.shape == (DOCUMENTS, 5)
    assert np.corrcoef(own.ravel(), expected.ravel())[0, 1] > SCORE_CORRELATION
    assert error(own, expected) < DAMPED_INVERSE / 100


def test_max_batch_size_makes_the_document_the_unit(models):
    folder = models["llama"]
    documents = documents_of(folder)
    fits = {
        cap: bergson.read(
            bergson.fit(folder, folder / "docs.jsonl", method="shampoo", max_batch_size=cap)
        )["gradient_sharded"]
        for cap in (1, None)
    }
    expected = {}
    for module, listed in documents.items():
        gradients = [kfac_numpy.weight_gradient(document) for document in listed]
        expected[module] = sum(gradient @ gradient.T for gradient in gradients)
    assert error(fits[1], expected) < ORACLE_AGREEMENT
    assert error(fits[None], expected) > 1e-2


def test_correction_is_the_exact_fishers_diagonal_in_the_eigenbasis():
    rng = np.random.default_rng(3)
    documents = [(rng.standard_normal((n, 4)), rng.standard_normal((n, 3))) for n in (5, 2, 7)]
    activation, gradient, count = kfac_numpy.covariances(documents)
    _, q_a = kfac_numpy.eigendecomposition(activation, count)
    _, q_s = kfac_numpy.eigendecomposition(gradient, count)
    correction = kfac_numpy.eigenvalue_correction(documents, q_s, q_a, len(documents))
    exact = kfac_numpy.exact_layer_fisher(*zip(*documents, strict=True)) / len(documents)
    dense = kfac_numpy.kronecker_fisher(q_s, q_a, correction)
    basis = np.kron(q_s, q_a)
    assert error(np.diag(basis.T @ exact @ basis), correction.ravel()) < ORACLE_AGREEMENT
    vector = rng.standard_normal((3, 4))
    solved = np.linalg.solve(dense + 0.1 * correction.mean() * np.eye(12), vector.ravel())
    applied = kfac_numpy.apply_damped_inverse(vector, q_s, q_a, correction, 0.1)
    assert error(applied.ravel(), solved) < ORACLE_AGREEMENT


def test_read_refuses_what_bergson_would_trip_over(models, tmp_path):
    folder = models["gpt2"]
    run = tmp_path / "run"
    shutil.copytree(bergson.fit(folder, folder / "docs.jsonl", processes=3), run)
    (run / "gradient_sharded" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="4 files"):
        bergson.read(run)
    (run / "gradient_sharded" / "index.json").unlink()
    # 104 rows over 3 shards are 36, 34, 34: the remainder may not lie in another shard.
    shards = run / "gradient_sharded"
    for old, new in (("shard_0", "x"), ("shard_2", "shard_0"), ("x", "shard_2")):
        (shards / f"{old}.safetensors").rename(shards / f"{new}.safetensors")
    with pytest.raises(ValueError, match="rows in its shards"):
        bergson.read(run)


def test_a_missing_or_failing_bergson_is_an_error(models, monkeypatch):
    folder = models["gpt2"]
    with pytest.raises(bergson_session.BergsonFailed, match="exceeds model max length"):
        bergson.fit(folder, folder / "docs.jsonl", token_batch_size=512)
    monkeypatch.setattr(bergson_session.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bergson_session.BergsonUnavailable, match="torch and bergson"):
        bergson_session.Driver()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_moves_the_logits(models, family):
    model = AutoModelForCausalLM.from_pretrained(models[family])
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.mul_(0.9)
            moved = error(model(tokens).logits.numpy(), expected)
            parameter.copy_(kept)
            assert moved > 1e-3, name


@pytest.mark.parametrize("bin", [False, True])
def test_sharded_checkpoints_hold_the_same_model(models, tmp_path, bin):
    folder = checkpoints.build("gpt2", tmp_path / "sharded", seed=1, shards=3, bin=bin)
    assert len(list(folder.glob("*.index.json"))) == 1
    expected = AutoModelForCausalLM.from_pretrained(models["gpt2"]).state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
