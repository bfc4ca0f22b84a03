"""Flax checkpoints: the same model on every mesh, readable by Orbax alone, refused in one line."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import converters.flax_checkpoint
from converters import load, save, save_flax
from converters.flax_checkpoint import FORMAT_FILE, PARAMETERS
from converters.loading import parameters
from converters.verify import verify
from jhessians.capture.linears import tapped_modules
from jhessians.devices.mesh import make_mesh
from jhessians.errors import CheckpointError, NumericsError, OutputError
from tests.converters.test_saving import stored

SHARDED = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128}


def bits(model):
    return {path: np.asarray(p[...]).tobytes() for path, p in parameters(model).items()}


def placed(model):
    return {path: (p.dtype, p[...].sharding) for path, p in parameters(model).items()}


@pytest.fixture(scope="module")
def flax_folder(checkpoint, tmp_path_factory):
    """`flax_folder(family, **options)`: a Flax checkpoint and the one of which it was made."""
    made = {}

    def get(family, **options):
        source = checkpoint(family, **options)
        if source not in made:
            made[source] = tmp_path_factory.mktemp("flax") / family
            save_flax(load(source, dtype="stored"), made[source])
        return made[source], source

    return get


@pytest.fixture
def copy(flax_folder, tmp_path):
    """One to spoil."""
    return shutil.copytree(flax_folder("llama", **SHARDED)[0], tmp_path / "flax")


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {"tie_word_embeddings": True, "bin": True}),
        ("gpt_neox", {"dtype": torch.bfloat16}),
        ("gpt2", {"dtype": torch.float16, "shards": 2}),
    ],
)
def test_there_and_back_is_bit_identical(family, options, flax_folder, tmp_path):
    folder, source = flax_folder(family, **options)
    ours, theirs = (load(each, dtype="stored") for each in (folder, source))
    assert bits(ours.model) == bits(theirs.model)
    assert placed(ours.model) == placed(theirs.model)
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    names = [[m.name for _, m in tapped_modules(x.model.layers.blocks)] for x in (ours, theirs)]
    assert names[0] == names[1] and all(names[0])
    for name, each in (("ours", ours), ("theirs", theirs)):
        save(each, tmp_path / name)
    got, expected = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].tobytes() == value.tobytes(), name
    files = [(tmp_path / name / "config.json").read_text() for name in ("ours", "theirs")]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [None, "stored", "bfloat16", "float16"])
@pytest.mark.parametrize("fsdp", [False, True])
def test_every_mesh_and_dtype_gives_what_hugging_faces_files_give(flax_folder, dtype, fsdp):
    folder, source = flax_folder("llama", **SHARDED)
    options = {"mesh": make_mesh(8), "fsdp": fsdp, "dtype": dtype}
    ours, theirs = load(folder, **options).model, load(source, **options).model
    assert bits(ours) == bits(theirs)
    assert placed(ours) == placed(theirs)


def test_a_sharded_model_writes_what_a_whole_one_does(flax_folder, tmp_path):
    folder, source = flax_folder("llama", **SHARDED)
    save_flax(load(source, mesh=make_mesh(8), fsdp=True).model, tmp_path / "sharded")
    assert bits(load(tmp_path / "sharded").model) == bits(load(folder).model)


def test_small_pieces_fit_other_meshes(flax_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(converters.flax_checkpoint, "_CHUNK_BYTES", 2**10)
    monkeypatch.setattr(converters.flax_checkpoint, "_UNDER_WAY_BYTES", 1)
    monkeypatch.setattr(converters.flax_checkpoint, "_SMALL_BYTES", 0)
    folder, source = flax_folder("llama", **SHARDED)
    save_flax(load(source, mesh=make_mesh(8), fsdp=True), tmp_path / "pieces")
    for devices in (None, 2, 4):
        mesh = None if devices is None else make_mesh(devices)
        again = load(tmp_path / "pieces", mesh=mesh, fsdp=mesh is not None).model
        assert bits(again) == bits(load(folder).model)


def test_orbax_alone_reads_it(flax_folder):
    """By the README's lines, with nothing of ours."""
    folder, _ = flax_folder("gpt_neox", dtype=torch.bfloat16)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(import orbax.*?)```", readme, re.DOTALL)
    assert "jhessians" not in lines and "converters" not in lines
    given = {"Path": Path, "jax": jax, "np": np}
    exec(lines.replace("pythia-flax", str(folder)), given)
    tree = given["parameters"]
    model = load(folder, dtype="stored").model
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(tree) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, state)))
    header = json.loads((folder / FORMAT_FILE).read_text())
    assert (header["version"], header["model_type"], header["dtype"]) == (1, "gpt_neox", "bfloat16")


def without(*parts):
    def spoil(folder):
        path = folder.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def header(**changes):
    def spoil(folder):
        path = folder / FORMAT_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def settings(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def data_cut_short(folder):
    files = [path for path in (folder / PARAMETERS).glob("**/d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])


def no_data(folder):
    for path in (folder / PARAMETERS).glob("**/d"):
        shutil.rmtree(path)


def description_damaged(folder):
    (folder / PARAMETERS / "_METADATA").write_text("{")


REFUSED = {
    "no format file": (without(FORMAT_FILE), "half written: it has no flax_checkpoint.json"),
    "no parameters": (without(PARAMETERS), "half written: it has no _METADATA"),
    "no description": (without(PARAMETERS, "_METADATA"), "half written: it has no _METADATA"),
    "no config": (without("config.json"), "has no config.json"),
    "no manifest": (without(PARAMETERS, "manifest.ocdbt"), "can't be read as a Flax checkpoint"),
    "no data": (no_data, "can't be read as a Flax checkpoint"),
    "data cut short": (data_cut_short, "can't be read as a Flax checkpoint"),
    "description damaged": (description_damaged, "can't be read as a Flax checkpoint"),
    "another format": (header(format="pickle"), "isn't that of a jhessians Flax checkpoint"),
    "a later version": (header(version=2), "version 2; expected 1"),
    "another family": (header(model_type="gpt2"), "'gpt2' where config.json says 'llama'"),
    "another shape": (settings(intermediate_size=120), r"misshapen: .*\[2, 128, 64\].*120"),
    "more layers": (settings(num_hidden_layers=5), r"misshapen: layers.blocks.* is \[2, .*\[5, "),
    "tied": (settings(tie_word_embeddings=True), "unexpected: head"),
    "biased": (settings(mlp_bias=True), "missing: layers.blocks.mlp.down.bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_in_one_line(case, copy, capfd):
    spoil, words = REFUSED[case]
    (copy / "manifest.json").unlink()  # it would say more
    spoil(copy)
    with pytest.raises(CheckpointError, match=words) as error:
        load(copy, mesh=make_mesh(8), fsdp=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("spoil", [data_cut_short, no_data, without(PARAMETERS, "manifest.ocdbt")])
def test_files_are_compared_with_the_manifest(copy, spoil):
    spoil(copy)
    with pytest.raises(CheckpointError, match="not what save_flax wrote: parameters/.*(d/|ocdbt)"):
        load(copy)


@pytest.mark.timeout(60)
def test_a_pipe_among_the_parameters_is_refused_at_once(copy):
    (copy / "manifest.json").unlink()
    next(path for path in copy.glob(f"{PARAMETERS}/**/d/*") if path.is_file()).unlink()
    os.mkfifo(copy / PARAMETERS / "d" / "pipe")
    with pytest.raises(CheckpointError, match="it is a named pipe; expected an ordinary file"):
        load(copy)


def test_orbaxs_own_folder_is_not_a_model(copy):
    with pytest.raises(CheckpointError, match="without a model's config.json; expected the folder"):
        load(copy / PARAMETERS)


def test_infinities_are_named(flax_folder, tmp_path):
    model = load(flax_folder("llama", **SHARDED)[0]).model
    model.embedding[...] = model.embedding[...].at[3, 4].set(1e30)
    save_flax(model, tmp_path / "wide")
    assert jnp.isfinite(load(tmp_path / "wide").model.embedding[...]).all()
    with pytest.raises(NumericsError, match="^embedding holds NaN or infinity as float16"):
        load(tmp_path / "wide", dtype="float16")


def test_verify_says_what_it_wants(flax_folder):
    with pytest.raises(CheckpointError, match="is a Flax checkpoint.* `jhessians convert "):
        verify(flax_folder("llama", **SHARDED)[0])


def test_nothing_is_overwritten_unasked(flax_folder, tmp_path):
    model = load(flax_folder("llama", **SHARDED)[0]).model
    save_flax(model, tmp_path / "model")
    with pytest.raises(OutputError, match="exists"):
        save_flax(model, tmp_path / "model")
    save_flax(model, tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing(flax_folder, tmp_path):
    """A limit on the size of files, which TensorStore meets as it would a full disk."""
    source = flax_folder("llama", **SHARDED)[0]
    program = f"""
import os, resource, signal
from converters import load, save_flax
from jhessians.errors import OutputError
loaded = load({str(source)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, {resource.RLIM_INFINITY}))
try:
    save_flax(loaded, {str(tmp_path / "model")!r})
except OutputError as error:
    print(error, flush=True)
os._exit(0)  # as our command does after an error: Orbax's threads may still be writing
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "a file grew beyond the limit" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert list(tmp_path.iterdir()) == []
