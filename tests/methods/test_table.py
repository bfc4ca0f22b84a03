"""The table of methods: a file is a method, wherever methods are listed."""

import subprocess
import sys
from pathlib import Path

import pytest

from jhessians.config.option import options_of
from jhessians.errors import ConfigError
from jhessians.methods.table import METHODS, method_named, table

SEVENTH = '''
"""A method that a file is all there is of: KFAC by another name, with an option of its own."""
from dataclasses import dataclass, replace

from jhessians.config.option import option
from jhessians.methods.kfac import KFAC


@dataclass(frozen=True)
class Options:
    loudness: int = option(3, "How loud.", group="statistics of --method seventh")


def fold(options, dtype):
    from jhessians.folds.covariance import Covariance

    print("loudness", options.loudness)
    return Covariance(dtype)


SEVENTH = replace(KFAC, name="seventh", bergson=None, options=Options, rank=7, fold=fold)
'''

RUN = """
import sys
import jhessians.methods
jhessians.methods.__path__.append(sys.argv[1])
from jhessians.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    (folder / "seventh.py").write_text(SEVENTH)
    return folder


def test_one_file_makes_a_method(folder, tmp_path):
    help = run(folder, "compute", "--help").stdout
    assert "--loudness" in help and "seventh" in help
    words = ["--max_tokens", "300", "--modules", "*.0.mlp.*", "--world_size", "1"]
    done = run(folder, "compute", str(tmp_path / "r"), "--method", "seventh", "--loudness", "5",
               *words)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loudness 5" in done.stdout and "seventh factors are in" in done.stdout
    # bergson has no such method: the run says nothing to it, and has Python of ours for a reader.
    assert "bergson ekfac" not in done.stdout and "jhessians.load_factors" in done.stdout
    assert "steps: []" in (tmp_path / "r" / "config.yaml").read_text()
    assert (tmp_path / "r" / "activation_sharded").is_dir()


def test_its_option_belongs_to_it_alone(folder, tmp_path):
    done = run(folder, "compute", str(tmp_path / "r"), "--loudness", "5")
    assert done.returncode == 2
    assert "--loudness belongs to --method seventh, not ekfac" in done.stderr


def test_the_default_comes_first():
    assert list(METHODS) == ["ekfac", "kfac", "tkfac", "shampoo", "kfac_reduce", "autocorrelation"]


def test_no_two_methods_share_an_option():
    own = {method.options for method in METHODS.values()}
    names = [each.name for options in own for each in options_of(options)]
    assert len(names) == len(set(names))


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="there is no method 'kfak'; did you mean"):
        method_named("kfak")


def test_the_readme_has_the_table():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert table() in readme, "python -m jhessians.methods.table prints README's table"
