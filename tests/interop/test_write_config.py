"""bergson hydrates and replays the config.yaml that we write."""

import dataclasses
import json

import pytest
import yaml
from bergson.cli.commands import Hessian
from bergson.config.config import HessianConfig, IndexConfig
from bergson.config.config_io import load_subconfig, parse_steps, read_config

from jhessians.interop.export import write_config
from jhessians.interop.layout import HESSIAN_CFG_KEYS, INDEX_CFG_KEYS

STEP = {
    "hessian_cfg": {"method": "kfac", "ev_correction": True, "hessian_dtype": "bf16"},
    "index_cfg": {
        "run_path": "out",
        "model": "demo",
        "data": {"dataset": "docs.jsonl", "truncation": True},
        "loss_reduction": "mean",
    },
}
DOCUMENT = {
    "steps": [{"hessian": STEP}],
    "jhessians": {"shards": 3},
    "metadata": {"jhessians_version": "1"},
}


def test_our_lists_of_keys_are_bergsons():
    assert {f.name for f in dataclasses.fields(HessianConfig)} == HESSIAN_CFG_KEYS
    assert {f.name for f in dataclasses.fields(IndexConfig)} == INDEX_CFG_KEYS


def test_bergson_hydrates_and_replays_it(tmp_path):
    write_config(tmp_path, DOCUMENT, {"shards": 3})
    hessian = load_subconfig(tmp_path, "hessian_cfg", HessianConfig)
    index = load_subconfig(tmp_path, "index_cfg", IndexConfig)
    assert (hessian.method, hessian.ev_correction, hessian.hessian_dtype) == ("kfac", True, "bf16")
    assert (index.data.dataset, index.loss_reduction) == ("docs.jsonl", "mean")
    ((name, command),) = parse_steps(read_config(tmp_path)["steps"], {"hessian": Hessian})
    assert name == "hessian" and command.hessian_cfg == hessian
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == DOCUMENT
    flat = json.loads((tmp_path / "config.json").read_text())
    assert flat == {"shards": 3, "metadata": {"jhessians_version": "1"}}


@pytest.mark.parametrize(
    ("layout", "names"), [("bergson", {"config.yaml"}), ("influence_results", {"config.json"})]
)
def test_each_tree_gets_its_own_file(tmp_path, layout, names):
    write_config(tmp_path, DOCUMENT, {}, layout=layout)
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("place", ["hessian_cfg", "index_cfg", None])
def test_a_key_that_bergson_would_refuse_is_refused_here(tmp_path, place):
    step = {key: dict(value) for key, value in STEP.items()}
    (step[place] if place else step)["shards"] = 3
    document = {**DOCUMENT, "steps": [{"hessian": step}]}
    with pytest.raises(ValueError, match=r"bergson does not know \['shards'\]"):
        write_config(tmp_path, document, {})
    with pytest.raises(RuntimeError):
        parse_steps(document["steps"], {"hessian": Hessian})
