"""What lies beside the weights stays with them, and nothing comes along that shouldn't."""

import errno
import json
import os
import shutil

import flax.nnx as nnx
import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import converters.companions
from converters import create, load, save, save_flax
from converters.origin import Origin
from jhessians.errors import CheckpointError, OutputError
from jhessians.models.decoder import Decoder

WRITERS = {"hf": save, "flax": save_flax}
KEPT = {
    "README.md": "a card",
    "LICENSE": "terms",
    "generation_config.json": json.dumps({"max_new_tokens": 7, "temperature": 0.3}),
    "chat_template.jinja": "{{ messages }}",
    "tokenizer.model": "\x00\x01",
    "vocab.json": "{}",
    "own.json": "{}",
    ".gitattributes": "*.bin lfs",
    "sub/deeper/notes.txt": "read me",
    "1_Pooling/config.json": "{}",
    "sub/parameters": "a file of this name, deeper",
}
LEFT = (
    "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "optimizer.pt",
    "original/consolidated.00.pth", "onnx/model.ONNX", "onnx/model.onnx_data", "q4.gguf",
    "variables/variables.data-00000-of-00001", "pytorch_model.bin.index.json", "old.safetensors",
    ".git/config", "sub/.git/config", ".cache/huggingface/download/config.json.metadata",
    "__pycache__/x.pyc", "flax_checkpoint.json.bin", "run/parameters/_METADATA",
    "run/parameters/d/0a1b2c", "run/parameters/manifest.ocdbt",
)  # fmt: skip


def fill(folder, files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(files[name] if isinstance(files, dict) else name)


def warnings_in(caplog):
    records = [r for r in caplog.records if r.name == "jhessians" and r.levelname == "WARNING"]
    return [record.getMessage() for record in records]


def names(folder):
    """All files but the manifest, which every result has."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return files - {"manifest.json"}


@pytest.fixture
def source(checkpoint, altered):
    folder = altered(checkpoint("gpt2"))
    fill(folder, KEPT)
    fill(folder, LEFT)
    return folder


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("part", ["loaded", "model", "copy"])
def test_all_but_weights_is_kept_bit_for_bit(writer, part, source, tmp_path):
    loaded = load(source)
    given = {"loaded": loaded, "model": loaded.model, "copy": nnx.merge(*nnx.split(loaded.model))}
    WRITERS[writer](given[part], tmp_path / "out")
    own = {"hf": {"model.safetensors"}, "flax": {"flax_checkpoint.json"}}[writer]
    found = {name for name in names(tmp_path / "out") if not name.startswith("parameters/")}
    assert found == {*KEPT, *own, "config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in found - own - {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name


def test_there_and_back_keeps_it_and_transformers_takes_it(source, tmp_path):
    save_flax(load(source), tmp_path / "flax")
    save(load(tmp_path / "flax").model, tmp_path / "back")
    assert not {"flax_checkpoint.json", "parameters"} & names(tmp_path / "back")
    assert {*KEPT} < names(tmp_path / "back")
    theirs = [AutoModelForCausalLM.from_pretrained(x) for x in (source, tmp_path / "back")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in theirs), strict=True))
    assert GenerationConfig.from_pretrained(tmp_path / "back").max_new_tokens == 7


def test_the_source_itself_and_a_folder_inside_it(source, tmp_path):
    """What is being written isn't copied into itself, nor an earlier result along with it."""
    inside = source / "sub" / "out"
    save(load(source), inside)
    assert {*KEPT} < names(inside) and not any(name.startswith("sub/out") for name in names(inside))
    again = tmp_path / "again"
    save(load(source), again)
    save_flax(load(again), again / "flax")
    save(load(again), again, overwrite=True)
    left = {name for name in names(again) if name.startswith("flax/parameters")}
    assert {*KEPT} < names(again) and not left
    with pytest.raises(OutputError, match="has no manifest.json"):
        save(load(source), source, overwrite=True)


def test_another_tokenizer_takes_the_place_of_all_files_of_the_old_one(source, tmp_path):
    loaded = load(source)
    loaded.tokenizer.add_tokens(["<new>"])
    for name, options in {"changed": {}, "given": {"tokenizer": loaded.tokenizer}}.items():
        save(loaded if name == "changed" else loaded.model, tmp_path / name, **options)
        again = load(tmp_path / name).tokenizer
        assert again.get_vocab() == loaded.tokenizer.get_vocab() and "<new>" in again.get_vocab()
        assert not {"vocab.json", "tokenizer.model"} & names(tmp_path / name)
        assert {"README.md", "own.json"} < names(tmp_path / name)


def test_the_config_in_hand_is_the_one_that_is_written(source, tmp_path):
    loaded = load(source)
    loaded.config.bos_token_id = 5
    save(loaded.model, tmp_path / "model")
    other = load(source).config
    other.bos_token_id = 6
    save(loaded, tmp_path / "given", config=other)
    save(loaded._replace(config=other), tmp_path / "replaced")
    numbers = [load(tmp_path / x).config.bos_token_id for x in ("model", "given", "replaced")]
    assert numbers == [5, 6, 6]


def test_a_model_made_here_knows_its_config_and_one_of_nobodys_does_not(checkpoint, tmp_path):
    config = load(checkpoint("gpt2")).config
    model = create(config, rngs=nnx.Rngs(0))
    for name, writer in WRITERS.items():
        writer(model, tmp_path / name)
        assert np.array_equal(load(tmp_path / name).model.embedding, model.embedding)
    assert names(tmp_path / "hf") == {"config.json", "model.safetensors"}
    bare = Decoder(model.config, rngs=nnx.Rngs(0))
    for writer in WRITERS.values():
        with pytest.raises(ValueError, match="its config isn't known.* give it as config="):
            writer(bare, tmp_path / "bare")
    save(bare, tmp_path / "bare", config=config)
    assert load(tmp_path / "bare").config.model_type == "gpt2"


def test_two_loads_of_one_folder_share_compilations(checkpoint):
    """And those of two folders don't: a compiled function may hand a model's origin on."""
    graphs = [nnx.split(load(checkpoint("gpt2", **x)).model)[0] for x in ({}, {}, {"shards": 2})]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])
    assert graphs[0] != graphs[2]
    first, second = (load(checkpoint("gpt2", **x)).model for x in ({}, {"shards": 2}))
    same = nnx.jit(lambda model: model)
    assert same(first).origin == first.origin and same(second).origin == second.origin


def test_a_source_that_is_gone_is_said(source, tmp_path, caplog):
    loaded = load(source)
    shutil.rmtree(source)
    save(loaded, tmp_path / "out")
    (said,) = warnings_in(caplog)
    assert f"{source}, from which the model came, is gone" in said
    assert {"tokenizer.json", "config.json"} < names(tmp_path / "out")


def test_links_are_followed_inside_the_folder_only(source, tmp_path, caplog):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.txt").write_text("secret")
    links = {
        "out.txt": secret / "key.txt", "folder": secret, "broken": source / "nothing",
        "git.txt": source / ".git" / "config", "weights.txt": source / "old.safetensors",
        "loop": source, "up.txt": "../secret/key.txt",
    }  # fmt: skip
    for name, target in {**links, "same.md": "README.md"}.items():
        (source / name).symlink_to(target)
    os.mkfifo(source / "pipe")
    save(load(source), tmp_path / "out")
    found = names(tmp_path / "out")
    assert not {*links, "pipe", "folder/key.txt"} & found
    assert (tmp_path / "out" / "same.md").read_text() == "a card"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    (said,) = warnings_in(caplog)
    assert "not kept" in said and "broken" in said and "and 3 more" in said


@pytest.fixture
def cached(source, tmp_path, monkeypatch):
    """The source in the Hub's cache, every file a link; the commit's folder."""
    repository = tmp_path / "hub" / "models--somebody--small"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (repository / "blobs").mkdir(parents=True)
    for number, name in enumerate(sorted(names(source))):
        shutil.copy(source / name, repository / "blobs" / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{number}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize("by_name", [True, False])
def test_a_snapshot_of_the_hub_is_kept_as_files(by_name, cached, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: [])
    save(load("somebody/small" if by_name else cached), tmp_path / "out")
    assert {*KEPT} < names(tmp_path / "out") and not {*LEFT} & names(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not warnings_in(caplog)


def test_companions_on_the_hub_are_downloaded_when_they_are_needed(
    source, tmp_path, monkeypatch, caplog
):
    there = tmp_path / "0123456789abcdef"
    asked = []

    def download(repository, file, *, revision):
        asked.append(file)
        if file == "LICENSE":
            raise ConnectionError("no network")
        (there / file).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(source / file, there / file))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    listed = sorted(names(source))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: listed)
    loaded = load("somebody/small")
    assert "README.md" not in asked
    save(loaded, tmp_path / "out")
    assert {*KEPT} - {"LICENSE"} < names(tmp_path / "out")
    assert not {*LEFT} & {*asked}
    (said,) = warnings_in(caplog)
    assert "not kept" in said and "LICENSE" in said


def test_files_that_cannot_be_read_or_written(source, tmp_path, monkeypatch):
    loaded = load(source)
    real = converters.companions.open_input

    def opened(path):
        if path.name == "LICENSE":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(converters.companions, "open_input", opened)
    for writer in WRITERS.values():
        with pytest.raises(CheckpointError, match="cannot read .*LICENSE: Permission denied"):
            writer(loaded, tmp_path / "out")
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(converters.companions.shutil, "copyfileobj", full)
    for writer in WRITERS.values():
        with pytest.raises(OutputError, match="the disk is full"):
            writer(loaded, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_origin_can_be_a_static_argument(checkpoint):
    origin = load(checkpoint("gpt2")).model.origin
    assert isinstance(origin, Origin) and origin.source.folder == checkpoint("gpt2")
    assert jax.jit(lambda x, _: x + 1, static_argnums=1)(1, origin) == 2
