"""Formats, dtypes and meshes give the same model; names are bergson's; memory is bounded."""

import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from converters import load, load_tokenizer, number_format, save_flax
from converters.loading import parameters
from converters.rope import rope_config
from jhessians.capture.linears import Tapped, tapped_modules
from jhessians.devices.mesh import make_mesh
from jhessians.errors import CheckpointError
from jhessians.models.rope import rotation

FAMILIES = ["llama", "gpt_neox", "gpt2"]


def values(model):
    return {path: np.asarray(variable[...]) for path, variable in parameters(model).items()}


def assert_same(ours, others):
    assert ours.keys() == others.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, others[path], err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "form", [{"shards": 3}, {"bin": True}, {"bin": True, "shards": 3}], ids=str
)
def test_every_format_gives_the_same_model(family, form, checkpoint):
    assert_same(
        values(load(checkpoint(family, **form)).model), values(load(checkpoint(family)).model)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_base_models_linears(family, checkpoint):
    folder = checkpoint(family)
    base = AutoModelForCausalLM.from_pretrained(folder).base_model
    theirs = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    model = load(folder).model
    stacked = [m.name for _, m in tapped_modules(model.layers.blocks)]
    ours = [name.format(layer=i) for i in range(model.config.layers) for name in stacked]
    assert sorted(ours) == sorted(theirs)
    for _, module in tapped_modules(model.layers.blocks):
        weight = base.get_submodule(module.name.format(layer=1)).weight.detach().numpy()
        square = weight.T if base.config.model_type != "gpt2" else weight
        np.testing.assert_array_equal(np.asarray(module.kernel[...][1]), square)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_models_checkpoint_loads(family, checkpoint, tmp_path):
    """Without the language model's head, and without its prefix in tensors' names."""
    folder = checkpoint(family, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.base_model.save_pretrained(tmp_path)
    assert_same(values(load(tmp_path).model), values(load(folder).model))


@pytest.mark.parametrize("fsdp", [False, True])
def test_mesh_gets_the_same_parameters(fsdp, checkpoint):
    folder = checkpoint("llama", vocab_size=320, hidden_size=64, intermediate_size=128)
    mesh = make_mesh(8)
    model = load(folder, mesh=mesh, fsdp=fsdp).model
    assert_same(values(model), values(load(folder).model))
    kernel = model.layers.blocks.mlp.down.kernel[...]
    assert kernel.sharding.is_fully_replicated != fsdp
    assert all(
        p[...].sharding.device_set == set(mesh.devices.flat) for p in parameters(model).values()
    )
    held = {shard.data.nbytes for shard in kernel.addressable_shards}
    assert held == {kernel.nbytes // (8 if fsdp else 1)}


def test_dtype_is_float32_unless_asked_for(checkpoint):
    half = checkpoint("gpt2", dtype=torch.float16)
    kernel = "layers.blocks.mlp.up.kernel"
    wide, stored = load(half), load(half, dtype="stored")
    assert (wide.dtype, stored.dtype) == (np.float32, np.float16)
    wide, stored = values(wide.model)[kernel], values(stored.model)[kernel]
    assert (wide.dtype, stored.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(wide, stored.astype(np.float32))
    narrow = load(checkpoint("gpt2"), dtype=jax.numpy.bfloat16)
    assert narrow.dtype == jax.numpy.bfloat16
    assert all(p.dtype == jax.numpy.bfloat16 for p in parameters(narrow.model).values())
    with pytest.raises(CheckpointError, match="float64, which JAX has turned off"):
        load(half, dtype="float64")


@pytest.mark.parametrize("wrong", ["int8", "bfloat61", "checkpoint", jax.numpy.int32])
def test_what_is_no_number_format_of_weights(wrong, tmp_path):
    with pytest.raises(ValueError, match="expected a floating-point format .* or 'stored'"):
        load(tmp_path, dtype=wrong)


@pytest.mark.parametrize("flax", [False, True])
def test_the_number_format_is_said(flax, checkpoint, tmp_path, caplog):
    """Aloud where nobody asked for another one than the files'; once in any case."""
    wide, half = checkpoint("gpt2"), checkpoint("gpt2", dtype=torch.bfloat16)
    if flax:
        for name, each in (("wide", wide), ("half", half)):
            save_flax(load(each, dtype="stored"), tmp_path / name)
        wide, half = tmp_path / "wide", tmp_path / "half"
    keeps = "; dtype='stored' keeps what is stored"
    for folder, dtype, level, line, words in (
        (wide, None, "INFO", "float32 and loaded as float32", "float32"),
        (half, None, "WARNING", f"bfloat16 and loaded as float32{keeps}",
         "float32, stored in bfloat16"),
        (half, "float32", "INFO", f"bfloat16 and loaded as float32{keeps}",
         "float32, stored in bfloat16"),
        (half, "stored", "INFO", "bfloat16 and loaded as bfloat16", "bfloat16"),
    ):  # fmt: skip
        caplog.clear()
        with caplog.at_level("INFO", "jhessians"):
            model = load(folder, dtype=dtype).model
        said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "jhessians"]
        assert said == [(level, f"{folder} is stored in {line}")]
        assert number_format(model) == words


def test_the_warning_is_seen_without_any_setting_up(checkpoint):
    program = "import sys, converters; converters.load(sys.argv[1])"
    folder = checkpoint("gpt2", dtype=torch.bfloat16)
    done = subprocess.run(
        [sys.executable, "-c", program, folder], check=True, capture_output=True, text=True
    )
    assert done.stdout == "" and done.stderr.count("loaded as float32") == 1


def test_the_tokenizer_comes_with_it(checkpoint, tmp_path, altered):
    folder = checkpoint("llama")
    _, config, tokenizer = load(folder)
    assert config.model_type == "llama"
    assert tokenizer("a b")["input_ids"] == load_tokenizer(folder)("a b")["input_ids"]
    bare = altered(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    assert load(bare).tokenizer is None
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer of .* can't be loaded"):
        load_tokenizer(bare)


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    """numpy's memory while loading, devices' memory being counted elsewhere."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=12,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    mesh = make_mesh(8)
    load(folder, mesh=mesh, fsdp=True)  # compiles
    tracemalloc.start()
    try:
        model = load(folder, mesh=mesh, fsdp=True).model
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest, total = 4 * 256 * 1024, sum(p[...].nbytes for p in parameters(model).values())
    assert total > 48e6
    assert peak < 3 * largest + 4e6  # a tensor, its copy, and Python's own objects


def test_no_torch_needed(checkpoint, tmp_path):
    """Neither imported with the package, nor missed where it isn't installed."""
    program = """
import sys
import converters
assert "torch" not in sys.modules
sys.modules["torch"] = None
converters.save(converters.load(sys.argv[1]), sys.argv[2])
"""
    folder = checkpoint("gpt2")
    subprocess.run([sys.executable, "-c", program, folder, tmp_path / "out"], check=True)
    assert (tmp_path / "out/config.json").read_text() == (folder / "config.json").read_text()


ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024,
     "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 1024,
     "short_factor": [1.0] * 32, "long_factor": [1.0 + 0.3 * i for i in range(32)]},
]  # fmt: skip


@pytest.mark.parametrize("settings", ROPES, ids=lambda s: s["rope_type"])
def test_angles_hold_far_out(settings):
    """Every position up to 8192: a frequency that is off by one bit shows here, not in logits."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=4096,
        rope_parameters={**settings, "rope_theta": 500000.0},
    )  # fmt: skip
    positions = torch.arange(8192)[None]
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)[0][0, :, :32].numpy()
    ours = rotation(rope_config(config, 64), jax.numpy.array([8192], "int32"), 8192)[0][0]
    # One bit of the fastest frequencies that aren't 1 makes 4e-4 here.
    assert np.abs(np.asarray(ours) - theirs).max() < 2e-3


def test_every_linear_is_named(checkpoint):
    model = load(checkpoint("gpt_neox")).model
    linears = [m for _, m in tapped_modules(model.layers.blocks)]
    assert len(linears) == 4 and all(isinstance(m, Tapped) and "{layer}" in m.name for m in linears)
