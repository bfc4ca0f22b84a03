"""The way back: the same tensors, names and bits as transformers' own save_pretrained."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import converters.saving
from converters import create, load, save
from jhessians.devices.mesh import make_mesh
from jhessians.errors import OutputError
from tests import tolerances
from tests.converters.comparison import documents, error, our_logits, their_logits


def stored(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "bin": True}),
        ("gpt_neox", {"dtype": torch.bfloat16}),
        ("gpt2", {"dtype": torch.float16, "shards": 2}),
    ],
)
def test_round_trip_is_bit_identical(family, options, checkpoint, tmp_path):
    folder = checkpoint(family, **options)
    reference = tmp_path / "reference"
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(reference)
    save(load(folder, dtype="stored"), tmp_path / "ours")
    expected, got = stored(reference), stored(tmp_path / "ours")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].tobytes() == value.tobytes(), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == theirs.dtype
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters()))  # noqa: B905
    configs = [json.loads((f / "config.json").read_text()) for f in (reference, tmp_path / "ours")]
    assert configs[0] == configs[1]


def test_sharded_model_to_several_files(checkpoint, tmp_path):
    folder = checkpoint("llama", hidden_size=64, intermediate_size=128)
    model, _, tokenizer = load(folder, mesh=make_mesh(8), fsdp=True)
    save(model, tmp_path / "ours", shard_bytes=100_000)
    files = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    assert all(len(load_file(tmp_path / "ours" / file)) for file in files)
    expected, got = stored(folder), stored(tmp_path / "ours")
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], expected[name]) for name in expected)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert load(tmp_path / "ours").tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_model_made_here_loads_in_transformers(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=72, max_position_embeddings=64,
    )  # fmt: skip
    model = create(config, rngs=nnx.Rngs(0))
    assert model.layers.blocks.mlp.up.name == "layers.{layer}.mlp.dense_h_to_4h"
    save(model, tmp_path / "new")
    batch = documents()
    ours, theirs = our_logits(model, batch), their_logits(tmp_path / "new", batch)
    assert error(ours, theirs) < tolerances.LOGITS


def test_nothing_is_overwritten_unasked_or_left_half_done(checkpoint, tmp_path, monkeypatch):
    model = load(checkpoint("gpt2")).model
    folder = tmp_path / "model"
    save(model, folder)
    with pytest.raises(OutputError, match="exists"):
        save(model, folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(converters.saving, "write_safetensors", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save(model, folder, overwrite=True)
    with pytest.raises(OutputError, match="the disk is full"):
        save(model, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert jnp.array_equal(load(folder).model.embedding[...], model.embedding[...])
