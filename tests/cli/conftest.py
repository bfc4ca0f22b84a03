"""Ingredients of a run of the command."""

import shutil
import sys
import types

import pytest

from tests.cli.work import SUMMARY, Work
from tests.oracles import checkpoints


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    sizes = {"n_embd": 24, "n_head": 2, "n_inner": 40, "n_layer": 1}
    checkpoints.build("gpt2", folder / "model", seed=1, **sizes)
    checkpoints.corpus(folder / "model", 6, lengths=(20, 9, 2, 1, 16, 24))
    shutil.move(folder / "model" / "docs.jsonl", folder)
    return folder


@pytest.fixture
def work(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    return Work(tmp_path)


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that records its calls and does whatever `pipeline.body` says."""
    fake = types.ModuleType("jhessians.commands.compute.pipeline")
    fake.calls = []
    fake.body = lambda config: SUMMARY
    fake.is_first_host = lambda: True

    def compute(config):
        fake.calls.append(config)
        return fake.body(config)

    fake.compute = compute
    monkeypatch.setitem(sys.modules, "jhessians.commands.compute.pipeline", fake)
    return fake
