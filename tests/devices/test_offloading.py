"""Weights in host memory: the same weights, the same factors."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import converters
import jhessians
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.devices import offloading
from jhessians.devices.fingerprint import fingerprint
from jhessians.devices.mesh import make_mesh
from jhessians.devices.offloading import HOST, is_in_host
from jhessians.errors import ConfigError, MeshError, NumericsError
from tests import small
from tests.oracles import checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = checkpoints.build("llama", tmp_path_factory.mktemp("llama"), seed=3)
    checkpoints.corpus(folder, 6)
    return folder


@pytest.fixture(scope="module")
def flax(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("flax") / "model"
    converters.save_flax(converters.load(folder).model, target)
    return target


def leaves(model) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model))}  # fmt: skip


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("kind", ["safetensors", "flax"])
def test_the_layers_lie_in_host_memory(folder, flax, kind, devices):
    source = folder if kind == "safetensors" else flax
    options = {"mesh": make_mesh(devices), "fsdp": True} if devices > 1 else {}
    usual, model = (converters.load(source, offload=o, **options).model for o in (False, True))
    found = leaves(model)
    for name, expected in leaves(usual).items():
        matrices = name.startswith("['layers']") and name.endswith("['kernel'].value")
        assert is_in_host(found[name]) == matrices, name
        assert found[name].sharding == expected.sharding.with_memory_kind(
            HOST if is_in_host(found[name]) else "device"
        )
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected))
    assert fingerprint(model) == fingerprint(usual)


@pytest.mark.parametrize("devices", [1, 8])
def test_factors_are_the_same(folder, devices):
    data = small.documents([12, 9, 5, 14, 3, 8, 11, 7], vocabulary=60)
    batches = small.batches(data, devices=devices)
    mesh = make_mesh(devices) if devices > 1 else None
    results = []
    for offload in (False, True):
        model = converters.load(folder, mesh=mesh, fsdp=mesh is not None, offload=offload).model
        loss = jhessians.NextTokenLoss("dataset")
        sites = jhessians.find_sites(loss, model, batches[0])
        results.append(jhessians.fit(jhessians.Problem(loss, model, sites, mesh=mesh), batches))
    usual, offloaded = results
    for kind, tensors in usual.items():
        for name, array in tensors.items():
            np.testing.assert_array_equal(offloaded[kind][name], array, err_msg=f"{kind} {name}")


def test_a_run_writes_the_same(folder, tmp_path):
    data = folder / "docs.jsonl"
    for offload in ("none", "weights"):
        config = ComputeConfig(
            str(tmp_path / offload), model=str(folder), dataset=str(data), offload=offload,
            quiet=True, truncation=True,
        )  # fmt: skip
        compute(config)
    files = sorted((tmp_path / "none").rglob("*.safetensors"))
    assert files
    for file in files:
        other = load_file(tmp_path / "weights" / file.relative_to(tmp_path / "none"))
        for name, array in load_file(file).items():
            np.testing.assert_array_equal(other[name], array)


def test_weights_that_are_not_finite_are_named(tmp_path):
    folder = checkpoints.build("llama", tmp_path, seed=3)
    (path,) = folder.glob("*.safetensors")
    from safetensors.numpy import save_file

    tensors = load_file(path)
    broken = next(name for name in tensors if "down_proj" in name)
    tensors[broken] = tensors[broken] * np.float32(np.nan)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NumericsError, match=r"layers.blocks.mlp.down.kernel holds NaN"):
        converters.load(folder, offload=True)


def test_devices_that_cannot_read_host_memory_are_refused(monkeypatch):
    monkeypatch.setattr(offloading, "HOST", "unknown")
    with pytest.raises(MeshError, match="weights can't stay in host memory: cpu devices read only"):
        offloading.in_host(None)
    with pytest.raises(ConfigError, match="--offload 'all' is not one of none, weights"):
        ComputeConfig("runs/x", offload="all")
