"""`jhessians advise`: its numbers against fits of the halves alone, its words, and bad input."""

import io
import json
import shutil
from contextlib import redirect_stdout

import numpy as np
import pytest

import jhessians
from jhessians import demo
from jhessians.cli.main import main
from jhessians.commands.advise.data import divide, part
from jhessians.data.documents import Documents
from jhessians.errors import DatasetError
from tests.commands.test_score import TINY
from tests.oracles import bergson, checkpoints

LENGTHS = (12, 6, 12, 1, 12, 6, 12, 12, 6, 12, 6)
DOCUMENTS = 30
DAMPING = 0.05
SIDES = ("activation", "gradient")


def fit(run, model, data, *more):
    words = ["compute", run, "--model", model, "--dataset", data, "--use_dataset_labels",
             "--token_batch_size", 128, "--world_size", 1, *more]  # fmt: skip
    with redirect_stdout(io.StringIO()) as out:
        assert main([str(word) for word in words]) == 0
    return run, out.getvalue()


def advise(run, *more):
    """What is printed."""
    devices = [] if {"--world_size", "--spectrum_only"} & set(more) else ["--world_size", "1"]
    with redirect_stdout(io.StringIO()) as out:
        assert main(["advise", str(run), *devices, *map(str, more)]) == 0
    return out.getvalue()


class Case:
    """A tiny model, its fit, and what is said of it."""

    def __init__(self, folder):
        self.folder = folder
        self.model = checkpoints.build("llama", folder / "model", seed=1, **TINY)
        self.data = checkpoints.corpus(self.model, DOCUMENTS, lengths=LENGTHS)
        self.run, self.summary = fit(folder / "run", self.model, self.data)
        words = ["--json", folder / "advice.json", "--damping_factor", DAMPING, "--halves_seed", 3,
                 "--held_out_queries", 2, "--held_out_documents", 3,
                 "--dampings", "0.05", "1e-3"]  # fmt: skip
        self.text = advise(self.run, *words)
        self.numbers = json.loads((folder / "advice.json").read_text())

    def rows(self, numbers, name):
        """A data set of some of the documents."""
        lines = self.data.read_text().splitlines()
        path = self.folder / name
        path.write_text("".join(lines[n] + "\n" for n in numbers))
        return path


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("advice"))


@pytest.fixture(scope="module")
def halves(case):
    """The halves fitted by themselves, and the gradients of the queries."""
    lengths = np.resize(LENGTHS, DOCUMENTS)
    documents = Documents(np.zeros(lengths.sum(), np.int32), None,
                          np.concatenate([[0], np.cumsum(lengths)]))  # fmt: skip
    division = divide(documents, queries=2, held_out=3, half=None, seed=3)
    fits = []
    for k, numbers in enumerate(division.halves):
        data = case.rows(numbers, f"half{k}.jsonl")
        run, _ = fit(case.folder / f"half{k}", case.model, data)
        fits.append((jhessians.load_factors(run), int((lengths[numbers] - 1).sum())))
    words = ["build", case.folder / "queries", "--model", case.model, "--dataset",
             case.rows(division.queries, "queries.jsonl"), "--quiet"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    store = jhessians.GradientStore(case.folder / "queries")
    shapes = fits[0][0].shapes("eigenvalue")
    return fits, {name: store.module(name).reshape(2, *shapes[name]) for name in shapes}


def wide(factors, kind, module):
    return np.asarray(factors[kind][module], np.float64)


def dense(factors, module, damping=0.0):
    """H + damping of a module as a matrix."""
    values = wide(factors, "eigenvalue_correction", module)
    basis = np.kron(*(wide(factors, f"{side}_eigenvectors", module) for side in SIDES[::-1]))
    return (basis * (values.ravel() + damping * values.mean())) @ basis.T


def half_the_difference(first, second):
    return np.linalg.norm(first - second) / np.sqrt((first * second).sum()) / 2


def test_errors_are_what_halves_that_were_fitted_alone_differ_by(case, halves):
    ((first, n_first), (second, n_second)), gradients = halves
    share = (n_first + n_second) / 2 / case.numbers["terms"]
    assert case.numbers["halves"]["positions"] == (n_first + n_second) / 2
    scale = np.sqrt(2 * share)  # the halves are a little less than halves
    found, solutions = case.numbers["modules"], []
    for module in gradients:
        errors = found[module]["halves"]["errors"]
        for side in SIDES:
            kind = f"{side}_covariance"
            means = wide(first, kind, module) / n_first, wide(second, kind, module) / n_second
            expected = scale * half_the_difference(*means)
            assert errors[kind] == pytest.approx(expected, rel=1e-3)
        matrices = [dense(factors, module) for factors in (first, second)]
        assert errors["hessian"] == pytest.approx(scale * half_the_difference(*matrices), rel=1e-3)
        vectors = gradients[module].reshape(2, -1).T.astype(np.float64)
        solutions.append(
            [np.linalg.solve(dense(f, module, DAMPING), vectors) for f in (first, second)]
        )
        expected = scale * half_the_difference(*solutions[-1])
        inverse = found[module]["halves"]["inverse_errors"][f"{DAMPING:g}"]
        assert inverse == pytest.approx(expected, rel=1e-3)
    whole = [np.concatenate(parts) for parts in zip(*solutions, strict=True)]
    expected = scale * half_the_difference(*whole)
    assert case.numbers["halves"]["inverse_errors"][f"{DAMPING:g}"] == pytest.approx(
        expected, rel=1e-3
    )
    assert 0.05 < expected < 3


def test_spectra_are_those_of_the_stored_factors(case):
    factors = jhessians.load_factors(case.run)
    for module, found in case.numbers["modules"].items():
        for side in SIDES:
            covariance = wide(factors, f"{side}_covariance", module)
            values = np.linalg.eigvalsh((covariance + covariance.T) / 2)
            shares = np.maximum(values, 1e-300) / values.sum()
            entropy = -(shares * np.log(shares)).sum()
            assert found[side]["dimension"] == len(values)
            assert found[side]["stable_rank"] == pytest.approx(values.sum() / values[-1], rel=1e-4)
            assert found[side]["effective_rank"] == pytest.approx(np.exp(entropy), rel=1e-4)
            lost = np.mean(values <= np.finfo(np.float32).eps * values[-1])
            assert found[side]["at_floor"] == pytest.approx(lost, abs=1.01 / len(values))
        values = wide(factors, "eigenvalue_correction", module)
        damping = DAMPING * values.mean()
        expected = (values.max() + damping) / (values.min() + damping)
        assert found["hessian"]["damped_condition_number"] == pytest.approx(expected, rel=1e-4)
        assert found["hessian"]["mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert case.numbers["dead_modules"] == []


def test_a_suggested_damping_follows_from_the_gains(case):
    found = case.numbers["damping"]
    assert found["tried"] == [0.001, 0.05] and found["held_out_documents"] == 3
    gains = np.array(found["gains"])
    assert gains.shape == (2, 2) and (gains > 0).all()
    means = np.exp(np.log(gains).mean(1))
    suggested = found["suggested"]
    assert suggested["best_gain"] == pytest.approx(means.max())
    assert suggested["gain"] == pytest.approx(means[found["tried"].index(suggested["damping"])])
    assert f"Damping: {suggested['damping']:g}." in case.text


def test_what_is_said_fits_a_terminal(case):
    _, *lines = case.text.splitlines()  # the first one has a path
    assert all(len(line) <= 80 for line in lines)
    heads = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    for head in ("Spectra", "Errors", "Damping", "Advice"):
        assert head in heads
    error = case.numbers["halves"]["inverse_errors"][f"{DAMPING:g}"]
    assert f"{100 * error:.0f}% in the inverse" in " ".join(case.text.split())
    assert not (case.folder / "advice.json.part").exists()


def test_the_whole_data_set_is_divided_at_random():
    documents = Documents(np.zeros(58, np.int32), None, np.array([0, 1, *range(4, 60, 3)]))
    usable = set(range(1, 20))
    found = divide(documents, queries=1, held_out=2, half=None, seed=0)
    parts = [found.queries, found.held_out, *found.halves]
    assert [len(part) for part in parts] == [1, 2, 8, 8]
    assert set(np.concatenate(parts)) == usable  # all different, none of one token
    again, other = (divide(documents, queries=1, held_out=2, half=None, seed=s) for s in (0, 1))
    assert (again.halves[0] == found.halves[0]).all() and set(other.halves[0]) != set(
        found.halves[0]
    )
    assert [len(x) for x in divide(documents, queries=9, held_out=9, half=3, seed=0)[:2]] == [2, 2]
    with pytest.raises(DatasetError, match="`half_documents` is 9, but 8 documents"):
        divide(documents, queries=1, held_out=1, half=9, seed=0)


def test_a_part_numbers_its_documents_as_the_data_set_does():
    """Since sampled labels depend on the number."""
    documents = Documents(np.arange(60, dtype=np.int32), None, np.arange(0, 61, 3))
    numbers = np.array([2, 5, 11, 17])
    batches = list(part(documents, numbers, token_batch_size=8, devices=2, positions=64))
    found = np.concatenate([batch.document for batch in batches])
    tokens = np.concatenate([batch.tokens[:, 0] for batch in batches])
    assert sorted(found[found >= 0]) == numbers.tolist()
    assert (tokens[found >= 0] == 3 * found[found >= 0]).all()


def test_the_spectra_alone_need_nothing_but_the_factors(case, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(case.run, run, ignore=shutil.ignore_patterns("config.*", "manifest.json"))
    text = advise(run, "--spectrum_only", "--json", tmp_path / "a.json")
    assert "Effective rank" in text and "Tokens" not in text and "Damping:" not in text
    found = json.loads((tmp_path / "a.json").read_text())
    assert "halves" not in found and "damping" not in found
    for module, numbers in found["modules"].items():
        assert numbers["activation"] == case.numbers["modules"][module]["activation"]


@pytest.mark.slow
def test_without_held_out_documents_no_damping_is_tried(case, tmp_path):
    """Fewer documents in each half, too: their errors are extrapolated to the whole."""
    text = advise(case.run, "--held_out_documents", 0, "--half_documents", 6, "--json",
                  tmp_path / "a.json")  # fmt: skip
    assert "Tokens" in text and "Damping:" not in text
    found = json.loads((tmp_path / "a.json").read_text())
    assert "damping" not in found and found["halves"]["documents"] == 6


def error(capsys, *words):
    capsys.readouterr()
    assert main(["advise", *map(str, words)]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--dampings", "1e-3", "much"], "--dampings takes positive numbers, got 'much'"),
        (["--dampings", "1e-3", "0"], "--dampings takes positive numbers, got '0'"),
        (["--dampings", "0.1"], "--dampings has one number; give two or more"),
        (["--spectrum_only", "--half_documents", "5"], "--half_documents is about passes over"),
        (["--spectrum_only", "--dataset", "x"], "--dataset is about passes over"),
        (["--overwrite"], "--overwrite is given without --json"),
        (["--json", "/nowhere/a.json"], "--json /nowhere/a.json can't be written; give a file in"),
        (["--held_out_queries", "0"], "--held_out_queries must be at least 1"),
        (["--model", "/nowhere", "--quiet"], "/nowhere"),
    ],
)
def test_bad_options(case, capsys, words, line):
    assert line in error(capsys, case.run, *words)


def test_bad_runs(case, tmp_path, capsys):
    assert "RUN is missing" in error(capsys)
    assert "is no folder; give a finished run" in error(capsys, tmp_path / "nowhere")
    assert "doesn't say which model and data it was fitted on" in error(capsys, tmp_path)
    assert "holds no factors" in error(capsys, tmp_path, "--spectrum_only")
    inside = case.run / "advice.json"
    assert "lies in the run, which is finished" in error(capsys, case.run, "--json", inside)
    taken = case.folder / "advice.json"
    before = taken.read_text()
    assert "exists; give another name, or --overwrite" in error(capsys, case.run, "--json", taken)
    assert taken.read_text() == before
    many = error(capsys, case.run, "--half_documents", 20, "--quiet")
    assert "--half_documents is 20, but 10 documents for each half are left of 27" in many


def test_data_or_a_model_that_do_not_fit(case, tmp_path, capsys):
    few = case.rows([0, 1, 3], "few.jsonl")
    line = error(capsys, case.run, "--dataset", few, "--quiet")
    assert "2 documents of two tokens or more; expected 8" in line and "--spectrum_only" in line
    other = checkpoints.build(
        "llama", tmp_path / "model", seed=1, **TINY | {"num_hidden_layers": 4}
    )
    line = error(capsys, case.run, "--model", other, "--quiet")
    assert "the Hessian has no factors for" in line


def test_a_dense_hessian_is_refused(case, tmp_path, capsys):
    run = tmp_path / "dense"
    shutil.copytree(case.run, run, ignore=shutil.ignore_patterns("manifest.json"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("method: ekfac", "method: autocorrelation"))
    assert "has the dense Hessian of --method autocorrelation" in error(capsys, run)


def test_the_summary_of_compute_says_what_the_spectra_say(case):
    text = " ".join(case.summary.split())
    values = jhessians.load_factors(case.run, ["activation_eigenvalues"])
    ranks = [float(x.sum() / x.max()) for x in values["activation_eigenvalues"].values()]
    assert f"stable ranks {np.median(ranks):.1f} and" in text
    assert f"jhessians advise {case.run} says whether" in text


@pytest.mark.slow
def test_the_demo(tmp_path):
    run = tmp_path / "run"
    assert main(["compute", str(run), "--split", "train[:48]", "--quiet"]) == 0
    text = advise(run, "--held_out_documents", 2, "--held_out_queries", 2, "--dampings", 0.1, 1,
                  "--json", tmp_path / "a.json")  # fmt: skip
    assert "Tokens: " in text and "Damping: " in text
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found["modules"]) == 28 and demo.MODEL.exists()
    errors = found["halves"]["errors"]
    # A is of tokens, Λ of documents' squares, of which there are fewer.
    assert 0.02 < errors["activation_covariance"] < errors["hessian"] < 5
    assert found["halves"]["inverse_errors"]["1"] < found["halves"]["inverse_errors"]["0.01"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kfac", "tkfac", "shampoo", "kfac_reduce"])
def test_every_factored_method(case, tmp_path, method):
    run, _ = fit(tmp_path / "run", case.model, case.data, "--method", method)
    advise(run, "--held_out_documents", 3, "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert all(0.01 < error < 10 for error in found["halves"]["errors"].values())


@pytest.mark.slow
def test_devices_and_partitions_do_not_matter(case, tmp_path):
    words = ["--damping_factor", DAMPING, "--halves_seed", 3, "--held_out_queries", 2,
             "--held_out_documents", 3, "--dampings", "0.05", "1e-3",
             "--json", tmp_path / "a.json"]  # fmt: skip
    advise(case.run, "--world_size", 4, "--module_partitions", 3, *words)
    found = json.loads((tmp_path / "a.json").read_text())
    for name in ("errors", "inverse_errors", "inverse_errors_shared"):
        for key, value in case.numbers["halves"][name].items():
            assert found["halves"][name][key] == pytest.approx(value, rel=1e-3)
    assert np.array(found["damping"]["gains"]) == pytest.approx(
        np.array(case.numbers["damping"]["gains"]), rel=1e-3
    )


@pytest.mark.slow
def test_bergsons_own_run(case, tmp_path):
    theirs = bergson.fit(case.model, case.data)
    text = advise(theirs, "--held_out_documents", 3, "--json", tmp_path / "a.json")
    assert "Tokens: " in text
    found = json.loads((tmp_path / "a.json").read_text())
    for module, numbers in found["modules"].items():
        expected = case.numbers["modules"][module]["activation"]["stable_rank"]
        assert numbers["activation"]["stable_rank"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_experts_that_no_token_reached(tmp_path):
    sizes = {"hidden_size": 12, "intermediate_size": 10, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 6, "num_local_experts": 8,
             "num_hidden_layers": 2}  # fmt: skip
    model = checkpoints.build("mixtral", tmp_path / "model", seed=1, **sizes)
    data = checkpoints.corpus(model, 12, lengths=(4, 2, 3))
    run, _ = fit(tmp_path / "run", model, data, "--moe_experts", "model.layers.*.mlp.experts")
    text = advise(run, "--held_out_documents", 1, "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    covariances = jhessians.load_factors(run, ["activation_covariance"])["activation_covariance"]
    dead = [name for name, a in covariances.items() if not np.any(a)]
    assert found["dead_modules"] == dead and dead
    assert f"{len(dead)} of 32 linears of experts are dead" in " ".join(text.split())
