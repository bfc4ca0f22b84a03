"""Our float32 factors against torch bergson's in float64, and bergson consuming what we write.

Random fan-in scaled models, documents of 1 to 150 tokens, the data set's own labels. bergson is the
truth here; where it is wrong and where it is right is settled in `tests/oracles`.
"""

import json
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jhessians.cli.main import main
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.data import batches as data_batches
from jhessians.data.documents import IGNORED
from jhessians.report.summary import Summary
from tests.oracles import bergson, checkpoints, kfac_numpy
from tests.tolerances import DAMPED_INVERSE, FACTORS, FLOAT64_FACTORS, SCORE_CORRELATION

DAMPING = 0.1
COVARIANCES = ("activation_sharded", "gradient_sharded")
EIGENVECTORS = ("eigen_activation_sharded", "eigen_gradient_sharded")
# Longer than the 128 positions of a model: one document that both sides truncate.
LENGTHS = (1, 2, 3, 60, 9, 25, 5, 41, 14, 90, 150)
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


@dataclass(frozen=True)
class Case:
    """A fit that both sides do.

    Attributes:
        family: Of the model.
        dataset: File beside the model.
        shared: Options that both sides name alike.
        shards: Of our export.
    """

    family: str
    dataset: str = "docs.jsonl"
    shared: tuple[tuple[str, Any], ...] = ()
    shards: int = 1


CASES = {
    "llama": Case("llama", shards=3),
    "gpt_neox": Case("gpt_neox", shared=(("include_bias", True),), shards=2),
    "gpt2": Case("gpt2", shared=(("loss_reduction", "mean"),)),
    "completions": Case(
        "llama",
        "completions.jsonl",
        shared=(("prompt_column", "question"), ("completion_column", "answer")),
    ),
}


class Pair(NamedTuple):
    """Both sides' folders and what is in them, and our summary."""

    ours: Path
    theirs: Path
    found: dict[str, Any]
    expected: dict[str, Any]
    summary: Summary


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for family in sorted({case.family for case in CASES.values()}):
        folders[family] = checkpoints.build(family, root / family, seed=1)
        checkpoints.corpus(folders[family], 25, lengths=LENGTHS)
        checkpoints.corpus(folders[family], 5, seed=7, lengths=(8, 30, 2, 17), name="query.jsonl")
    llama = folders["llama"]
    (llama / "chat_template.jinja").write_text(TEMPLATE)
    texts = [json.loads(line)["text"] for line in (llama / "docs.jsonl").read_text().splitlines()]
    rows = [
        {"question": question, "answer": f" {answer.strip()} indeed"}
        for question, answer in zip(texts[1:14], texts[9:22], strict=True)
    ]
    (llama / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders


def options_of(case: Case, models) -> dict[str, Any]:
    folder = models[case.family]
    return {
        "model": str(folder),
        "dataset": str(folder / case.dataset),
        "truncation": True,
        "use_dataset_labels": True,
        "token_batch_size": 512,
        **dict(case.shared),
    }


def ours(out: Path, case: Case, models, **options: Any) -> Summary:
    """Our factors of a case in `out`, on one device, in this process."""
    given = options_of(case, models) | {"num_shards": case.shards, "world_size": 1} | options
    return compute(ComputeConfig(run_path=str(out), **given))


def theirs(case: Case, models) -> Path:
    """bergson's factors of a case in float64, with batches and shards other than ours."""
    folder = models[case.family]
    options = {name: value for name, value in case.shared if not name.endswith("_column")}
    columns = [f"--{name}={value}" for name, value in case.shared if name.endswith("_column")]
    return bergson.fit(folder, folder / case.dataset, extra=columns, **options)


@pytest.fixture(scope="module")
def pairs(models, tmp_path_factory):
    """The two sides of a case by its name, fitted when first asked for."""
    fitted: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in fitted:
            case = CASES[name]
            # A name with a space in it, as users have them.
            run = tmp_path_factory.mktemp(name) / "our run"
            summary = ours(run, case, models)
            truth = theirs(case, models)
            fitted[name] = Pair(run, truth, bergson.read(run), bergson.read(truth), summary)
        return fitted[name]

    return pair


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The larger one of the relative errors by largest entry and by Frobenius norm."""
    assert found.shape == expected.shape
    difference = found - expected
    return max(
        float(np.abs(difference).max() / np.abs(expected).max()),
        float(np.linalg.norm(difference) / np.linalg.norm(expected)),
    )


def errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """`error` by module; both sides must hold the same ones."""
    assert list(found) == list(expected) or set(found) == set(expected)
    return {name: error(found[name], expected[name]) for name in expected}


def factor_errors(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The worst module of each thing that does not depend on the choice of eigenvectors.

    An eigenvector's sign is free, and so is any basis of an eigenspace; covariances, eigenvalues
    and the total of the corrected ones are not.
    """
    worst = {
        folder: max(errors(found[folder], expected[folder]).values())
        for folder in (*COVARIANCES, "eigenvalue_sharded", "factor_eig_a", "factor_eig_g")
    }
    correction = "eigenvalue_correction_sharded"
    sums = ({name: v.sum(keepdims=True) for name, v in side[correction].items()}
            for side in (found, expected))  # fmt: skip
    return worst | {correction: max(errors(*sums).values())}


@pytest.mark.parametrize("name", CASES)
def test_factors_agree_with_bergson_in_float64(pairs, name, record_property):
    pair = pairs(name)
    assert pair.found["total_processed"] == pair.expected["total_processed"]
    assert pair.summary.positions == pair.expected["total_processed"]
    assert set(pair.found) == set(pair.expected)
    for folder in set(pair.expected) - {"total_processed"}:
        shapes = ({n: v.shape for n, v in s[folder].items()} for s in (pair.found, pair.expected))
        assert next(shapes) == next(shapes), folder
    for folder, worst in factor_errors(pair.found, pair.expected).items():
        record_property(folder, worst)
        assert worst < FACTORS, folder


@pytest.mark.parametrize("name", CASES)
def test_eigenvectors_diagonalise_bergsons_covariances(pairs, name):
    """What makes an eigenbasis one, measured on the covariances in float64."""
    pair = pairs(name)
    for kind, folder in zip(("activation", "gradient"), COVARIANCES, strict=True):
        for module, q in pair.found[f"eigen_{folder}"].items():
            covariance = pair.expected[folder][module]
            assert error(q.T @ q, np.eye(len(q))) < FACTORS, (kind, module)
            rotated = q.T @ covariance @ q
            off = rotated - np.diag(np.diag(rotated))
            assert np.abs(off).max() < FACTORS * np.abs(rotated).max(), (kind, module)


def gradients_for(pair: Pair) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {name: v.shape for name, v in pair.expected["eigenvalue_sharded"].items()}
    return {name: rng.standard_normal((2, *shape)) for name, shape in shapes.items()}


def inverse_by_numpy(factors: dict[str, Any], gradients: dict[str, np.ndarray], corrected: bool):
    values = factors["eigenvalue_correction_sharded" if corrected else "eigenvalue_sharded"]
    return {
        name: kfac_numpy.apply_damped_inverse(
            gradient,
            factors["eigen_gradient_sharded"][name],
            factors["eigen_activation_sharded"][name],
            values[name],
            DAMPING,
        )
        for name, gradient in gradients.items()
    }


@pytest.mark.parametrize("corrected", [True, False], ids=["ekfac", "kfac"])
@pytest.mark.parametrize("name", CASES)
def test_damped_inverse_agrees(pairs, name, corrected, record_property):
    """Ours through bergson's own reader, against bergson's factors in float64 through numpy."""
    pair = pairs(name)
    gradients = gradients_for(pair)
    expected = inverse_by_numpy(pair.expected, gradients, corrected)
    options = {"ev_correction": corrected, "damping_factor": DAMPING}
    applied = bergson.consume_from_path(pair.ours, gradients, **options)
    worst = max(errors(applied, expected).values())
    record_property("damped inverse", worst)
    assert worst < DAMPED_INVERSE
    # bergson read what we wrote: the same factors through numpy give the same, only closer.
    own = inverse_by_numpy(pair.found, gradients, corrected)
    assert max(errors(applied, own).values()) < DAMPED_INVERSE / 100
    # A module that bergson did not recognise would have come back unchanged.
    assert min(errors(applied, gradients).values()) > 0.1


def test_three_ranks_read_their_shards(pairs):
    pair = pairs("llama")
    gradients = gradients_for(pair)
    expected = inverse_by_numpy(pair.expected, gradients, True)
    applied = bergson.consume_from_shards(pair.ours, gradients, processes=3, damping_factor=DAMPING)
    assert max(errors(applied, expected).values()) < DAMPED_INVERSE


def test_bergson_scores_with_our_factors_in_place_of_its_own(pairs, models, tmp_path):
    pair, folder = pairs("gpt2"), models["gpt2"]
    data, queries = folder / "docs.jsonl", folder / "query.jsonl"
    options = {"damping_factor": DAMPING, "loss_reduction": "mean"}
    own = bergson.ekfac_scores(tmp_path / "own", folder, data, queries, **options)
    # `ekfac_scores` makes sure that bergson skips its fit if and only if there are factors.
    shutil.copytree(pair.ours, tmp_path / "given" / "hessian" / "kfac")
    given = bergson.ekfac_scores(tmp_path / "given", folder, data, queries, **options)
    assert np.corrcoef(given.ravel(), own.ravel())[0, 1] > SCORE_CORRELATION
    assert error(given, own) < DAMPED_INVERSE
    # Scores hang on the factors: other ones give others.
    kfac = bergson.ekfac_scores(
        tmp_path / "other", folder, data, queries, ev_correction=False, **options
    )
    assert error(kfac, own) > 10 * DAMPED_INVERSE


def test_the_summarys_next_command_works(pairs, tmp_path):
    """What a run tells its user to do next: bergson takes the factors as they lie."""
    pair = pairs("gpt2")
    commands = pair.summary.next_shell.replace("\\\n", " ").splitlines()
    subprocess.run(["bash", "-ec", "\n".join(commands[:-1])], cwd=tmp_path, check=True)
    program, *words = shlex.split(commands[-1])
    assert program == "bergson"
    output = bergson.run_command(words)
    scores = Path(words[1])
    assert f"Skipping (already complete at {scores / 'hessian' / 'kfac'})" in output
    assert (scores / "scores" / "scores.bin").stat().st_size
    # Nor did bergson write into our folder.
    assert not (pair.ours / "scores").exists()


def test_the_summarys_python_works(pairs):
    namespace: dict[str, Any] = {}
    exec(pairs("llama").summary.next_python, namespace)
    assert "FactoredPreconditioner" in namespace


def test_float64_agrees_to_rounding(models, tmp_path, record_property):
    """On the family that computes nothing in float32, as Llama's norms and rotary tables do."""
    case = CASES["gpt2"]
    given = options_of(case, models) | {"precision": "fp64", "hessian_dtype": "fp64"}
    flags = [f"--{name}={str(v).lower() if v is True else v}" for name, v in given.items()]
    assert main(["compute", str(tmp_path / "run"), "--quiet", "--world_size=1", *flags]) == 0
    found, expected = bergson.read(tmp_path / "run"), bergson.read(theirs(case, models))
    # bergson rounds positions per document to float32, so its eigenvalues are off by 1e-8.
    count, documents = expected["total_processed"], 25
    for module, values in found["eigenvalue_sharded"].items():
        lambda_a, lambda_s = (
            kfac_numpy.eigendecomposition(expected[folder][module], count)[0]
            for folder in COVARIANCES
        )
        outer = kfac_numpy.kronecker_eigenvalues(lambda_s, lambda_a, count, documents)
        assert error(values, outer) < FLOAT64_FACTORS, module
    worst = factor_errors(found, expected)
    for folder in (*COVARIANCES, "eigenvalue_correction_sharded"):
        record_property(folder, worst[folder])
        assert worst[folder] < FLOAT64_FACTORS, folder


def counts_the_last_position(batch):
    """The wrong twin of a mask: padding stays out, a document's last position comes in."""
    mask = batch.position_mask.copy()
    for row, length in enumerate(mask.sum(axis=1)):
        mask[row, length] = length > 0
    return batch._replace(position_mask=mask)


def shifts_the_labels(batch):
    """The wrong twin of the loss: every position predicts the token after next."""
    labels = np.roll(batch.labels, -1, axis=1)
    labels[:, -1] = IGNORED
    return batch._replace(labels=labels)


@pytest.mark.parametrize(
    ("twin", "folder"),
    [(counts_the_last_position, "activation_sharded"), (shifts_the_labels, "gradient_sharded")],
)
def test_a_wrong_twin_fails(pairs, models, tmp_path, monkeypatch, twin, folder):
    iterate = data_batches.iterate_batches
    monkeypatch.setattr(
        data_batches, "iterate_batches", lambda *a, **k: map(twin, iterate(*a, **k))
    )
    ours(tmp_path / "run", CASES["llama"], models, method="kfac")
    expected = pairs("llama").expected[folder]
    wrong = errors(bergson.read(tmp_path / "run")[folder], expected)
    assert min(wrong.values()) > 10 * FACTORS


def test_another_eigenbasis_is_a_wrong_twin(pairs):
    """Corrected eigenvalues belong to their eigenvectors: in another order the inverse is off."""
    pair = pairs("gpt2")
    gradients = gradients_for(pair)
    expected = inverse_by_numpy(pair.expected, gradients, True)
    twisted = dict(pair.found)
    twisted["eigenvalue_correction_sharded"] = {
        name: values[::-1] for name, values in pair.found["eigenvalue_correction_sharded"].items()
    }
    wrong = errors(inverse_by_numpy(twisted, gradients, True), expected)
    assert min(wrong.values()) > 10 * DAMPED_INVERSE
