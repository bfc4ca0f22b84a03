"""The benchmark's arithmetic and reading of logs, and one small run of the whole of it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a file of the benchmark, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


# MFLOP per token, counted by hand: covariance pass and correction, of us and of bergson.
COUNTED = [
    ("256,6,688,2048", (33, 54), (47, 56)),
    ("512,8,1408,8192", (184, 300), (261, 312)),
    ("768,6,2048,8192", (299, 488), (424, 509)),
]


@pytest.mark.parametrize(("shape", "needed", "bergson"), COUNTED)
def test_arithmetic_of_the_three_shapes(module, shape, needed, bergson):
    models = module("models")
    parsed = models.Shape.parse(shape)
    for count, expected in ((models.needed, needed), (models.bergson_does, bergson)):
        found = count(parsed, 256)
        assert (round(found.covariance / 1e6), round(found.correction / 1e6)) == expected


def test_long_documents_are_rotated_as_matrices(module):
    models = module("models")
    shape = models.Shape(64, 1, 192, 256)
    assert models.needed(shape, 4096).correction < models.needed(shape, 64).correction


@pytest.mark.parametrize("text", ["512,8,1408", "500,8,1408,8192", "512,8,-1,8192", "large,er"])
def test_a_wrong_shape_is_refused(module, text):
    with pytest.raises(ValueError):
        module("models").Shape.parse(text)


def test_stages_are_read_from_bergsons_bars(module):
    compare, measure = module("compare"), module("measure")
    tool = compare.contestants(compare.arguments(["--shape", "tiny"]), Path("model"))[1]
    log = [
        (1.0, "Computing Approximating Hessians with kfac:   0%|   | 0/4"),
        (3.0, "Computing Approximating Hessians with kfac: 100%|###| 4/4"),
        (4.0, "collector.py: INFO: Total processed: 8064"),
        (4.5, "Rank 0: Computing eigenvectors:   0%|   | 0/14"),
        (7.0, "eigenvectors.py: INFO: Saved uncorrected eigenvalues to run.part"),
        (8.0, "Computing Approximating Hessians with kfac (eigenvalue correction):   0%|   | 0/4"),
        (9.5, "collector.py: INFO: Total processed: 8064"),
    ]
    found = measure.stage_seconds(log, tool.stages)
    assert found == {"covariances": 3.0, "eigendecompositions": 2.5, "correction": 1.5}


def test_private_folders_stay_out_of_the_record(module):
    shown = module("compare").command_line(["--work", "/a/b", "--shape", "tiny", "--results=/c"])
    assert shown == "python examples/benchmarks/compare.py --work DIR --shape tiny --results"


def made_up_fit(measure, scaling, tokens, *, covariances, correction, peak):
    """A fit as its process and its profile tell it; 3 s of each pass are the compiler's."""
    stages = [
        {"name": "Covariances", "seconds": covariances + 3, "compile_seconds": 3.0,
         "memory_bytes": peak},
        {"name": "Eigendecompositions", "seconds": 9.0, "compile_seconds": 0.0,
         "memory_bytes": peak // 2},
        {"name": "Eigenvalue correction", "seconds": correction + 3, "compile_seconds": 3.0,
         "memory_bytes": peak // 2},
    ]  # fmt: skip
    run = measure.Run("jhessians", 40.0, {}, 99 * 10**9, 80.0, 0.5)
    return scaling.read_profile(tokens, run, {"stages": stages})


def test_growth_and_start_up_are_reported(module):
    measure, scaling = module("measure"), module("scaling")

    def started(seconds):
        return measure.Run("jhessians", 20.0, {scaling.FIRST_STEPS: seconds}, 10**9, 30.0, 1.5)

    fits = [
        made_up_fit(measure, scaling, tokens, covariances=a, correction=b, peak=peak)
        for tokens, a, b, peak in (
            (1000, 1.0, 2.0, 10**9), (2000, 2.2, 4.0, 10**9),
            (1000, 9.0, 2.0, 10**9), (2000, 2.2, 4.0, 11 * 10**8),
            (1000, 1.0, 2.0, 10**9), (2000, 2.2, 4.0, 11 * 10**8),
        )
    ]  # fmt: skip
    starts = {"empty": [started(s) for s in (9.0, 30.0, 8.0)], "left by the run before": []}
    starts["left by the run before"] = [started(4.0)] * 3
    record = scaling.Record(
        "a machine", {"jax": "0"}, "a command", module("models").Shape(64, 2, 192, 256), 64, 2048,
        fits, starts,
    )  # fmt: skip
    page = scaling.markdown(record)
    assert "medians of 3 each, in turn; load average before a run: 0.5 to 1.5" in page
    assert "| 1,000 | 1.000 | 1.00x |  | 2.000 | 1.00x |  | 40.0 | 1.00 | 1.00x |" in page
    assert "| 2,000 | 1.100 | 1.10x | 1.200 | 2.000 | 1.00x | 2.000 | 40.0 | 1.10 | 1.10x |" in page
    assert "| empty | 9.0 | 8.0 to 30.0 | 20.0 | 10 |" in page
    assert "| left by the run before | 4.0 | 4.0 to 4.0 | 20.0 | 5 |" in page


@pytest.mark.parametrize("line", ["Covariances: 20 %, 9 positions/s", "Covariances: 9 in 2 s"])
def test_first_steps_are_counted_from_the_start_of_the_process(module, line):
    log = [(0.0, ""), (1.0, "Data ..."), (5.0, "Covariances: 9 positions ..."), (7.5, line)]
    scaling = module("scaling")
    found = module("measure").stage_seconds([*log, (8.0, "Covariances: 30 %")], scaling.STARTED)
    assert found == {scaling.FIRST_STEPS: 7.5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shape huge", "'huge' is no shape"),
        ("--repeats 0", "--repeats must be at least 1"),
        ("--tokens 128", "--chunk must be at least 2, and at most --tokens and --batch"),
        ("--tokens many", "--tokens: invalid int value: 'many'"),
    ],
)
def test_wrong_options_of_scaling_end_in_a_line(module, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        module("scaling").main(words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_failed_run_of_scaling_ends_in_a_line(module, monkeypatch, capsys):
    scaling = module("scaling")

    def fail(*arguments):
        raise module("measure").RunFailed("jhessians ended with 1")

    monkeypatch.setattr(scaling, "measure", fail)
    assert scaling.main(["--shape", "tiny"]) == 1
    assert capsys.readouterr().err == "scaling.py: jhessians ended with 1\n"


@pytest.mark.slow
def test_growth_and_start_up_of_a_tiny_model(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    words = ["--shape", "tiny", "--tokens", "2048", "--chunk", "64", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scaling.py"), *words, "--results", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert [fit["tokens"] for fit in record["fits"]] == [2048, 4096, 8192, 16384]
    for fit in record["fits"]:
        # A tiny model's passes take no longer than what is taken out of them.
        took = sum(fit["passes"].values()) + fit["compile_seconds"]
        assert 0 < took < fit["seconds"]
        assert fit["peak_bytes"] > 10**8
    (cold,), (warm,) = record["starts"].values()
    assert 0 < warm["stages"]["first steps"] < cold["stages"]["first steps"]
    page = (tmp_path / "scaling.md").read_text()
    assert str(tmp_path) not in page
    assert page in done.stdout


@pytest.mark.slow
def test_whole_benchmark(tmp_path):
    """jhessians and bergson, from this interpreter's environment, agree and are reported."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    words = ["--shape", "tiny", "--repeats", "1", "--skip-install"]
    folders = ["--peers-env", sys.prefix, "--results", str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "compare.py"), *words, *folders],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results" / "tiny.json").read_text())
    (comparison,) = record["comparisons"]
    assert [run["tool"] for run in comparison["runs"]] == ["jhessians", "bergson"]
    assert all(min(run["stages"].values()) > 0 for run in comparison["runs"])
    assert max(comparison["errors"]["bergson"].values()) < 5e-6
    page = (tmp_path / "results" / "tiny.md").read_text()
    assert str(tmp_path) not in page
    assert "| bergson |" in page
