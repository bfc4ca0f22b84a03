"""The engine on tables of its own, and the Hub's cache."""

import dataclasses
import json
import shutil

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import hub, llama, load, load_tokenizer, register, registry, rules, supported
from converters.reader import open_checkpoint
from jhessians.errors import CheckpointError


def test_any_number_of_leading_axes(tmp_path):
    """A mixture of experts: one array of ours, a tensor of theirs per layer and expert."""
    family = dataclasses.replace(
        llama.FAMILIES[0],
        rules=rules.linear("experts.up", "model.layers.{layer}.mlp.experts.{expert}.up_proj"),
    )
    homes = rules.homes(family, {"experts.up.kernel": (2, 3, 4, 5)})
    assert len(homes) == 6
    home = homes["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert (home.index, home.shape) == ((1, 2), (5, 4))
    assert rules.module_names(family) == {
        "experts.up": "layers.{layer}.mlp.experts.{expert}.up_proj"
    }


@pytest.mark.parametrize(
    "shapes, table, message",
    [
        ({"a": (2,), "b": (2,)}, (rules.Rule("a", "x"),), "no rule for b"),
        ({"a": (2,)}, (rules.Rule("a", "x"), rules.Rule("a", "y")), "names a twice"),
        ({"a": (2,), "b": (2,)}, (rules.Rule("a", "x"), rules.Rule("b", "x")), "gives x to two"),
    ],
)
def test_tables_must_name_everything_once(shapes, table, message):
    with pytest.raises(ValueError, match=message):
        rules.homes(dataclasses.replace(llama.FAMILIES[0], rules=table), shapes)


@pytest.mark.parametrize("transform", [rules.IDENTITY, rules.TRANSPOSE], ids=lambda t: t.name)
def test_transforms_are_reversible(transform):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(transform.to_theirs(transform.to_ours(x)), x)


def test_tables_cover_their_families(checkpoint):
    """No rule of a table is dead: each one is used by some config."""
    for family, options in {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "gpt_neox": {},
        "gpt2": {"tie_word_embeddings": False},
    }.items():
        checkpoint_of = open_checkpoint(checkpoint(family, **options))
        templates = {rule.theirs for rule in registry._FAMILIES[family].rules}
        names = {template.format(layer=1) for template in templates}
        stored = {name for name in checkpoint_of.tensors if ".0." not in name}
        norms_without_bias = {n for n in names - stored if "norm" in n and n.endswith("bias")}
        assert stored == names - norms_without_bias


def test_a_family_of_ones_own(checkpoint, altered, monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    family = dataclasses.replace(
        llama.FAMILIES[0],
        model_type="my_llama",
        rules=tuple(
            dataclasses.replace(rule, theirs=rule.theirs.replace("self_attn", "attention"))
            for rule in llama.FAMILIES[0].rules
        ),
    )
    register(register(family))
    with pytest.raises(ValueError, match="exists already"):
        register(dataclasses.replace(family, base_prefix="other"))
    assert "my_llama" in supported()
    folder = altered(checkpoint("llama"), model_type="my_llama")
    values = load_file(folder / "model.safetensors")
    renamed = {name.replace("self_attn", "attention"): value for name, value in values.items()}
    save_file(renamed, folder / "model.safetensors")
    model = load(folder).model
    assert model.layers.blocks.attention.key.name == "layers.{layer}.attention.k_proj"


@pytest.fixture
def cached(checkpoint, tmp_path, monkeypatch):
    """A model in the Hub's cache, with no Hub to be reached."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--small"
    shutil.copytree(checkpoint("llama", shards=2), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / commit


def test_a_name_on_the_hub_loads_from_the_cache(cached, checkpoint):
    model, _, tokenizer = load("somebody/small")
    expected = load(checkpoint("llama")).model
    assert np.array_equal(model.embedding[...], expected.embedding[...])
    assert tokenizer("a")["input_ids"] == load_tokenizer("somebody/small")("a")["input_ids"]
    assert hub.find("somebody/small").revision == cached.name
    with pytest.raises(CheckpointError, match="cannot get config.json of somebody/small"):
        load("somebody/small", revision="other")


def test_half_a_download_in_the_cache(cached):
    next(cached.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="half downloaded"):
        load("somebody/small")


def test_only_the_needed_files_are_downloaded(tmp_path, checkpoint, monkeypatch):
    """Of a repository with weights in two formats and other things besides."""
    asked = []

    def download(repository, file, *, revision):
        asked.append((file, revision))
        assert (folder / file).is_file()
        return str(shutil.copy(folder / file, there / file))

    there = tmp_path / "0123456789abcdef"
    there.mkdir()
    folder = checkpoint("gpt2", shards=2)
    files = [path.name for path in folder.iterdir()]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files",
        lambda *_, **__: [*files, "pytorch_model.bin", "original/consolidated.00.pth", "README.md"],
    )  # fmt: skip
    load("somebody/small", revision="branch")
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert asked[0] == ("config.json", "branch")
    assert {revision for _, revision in asked[1:]} == {there.name}
    assert {file for file, _ in asked} == {
        "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        *weights.values(),
    }  # fmt: skip
