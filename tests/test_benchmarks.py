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
