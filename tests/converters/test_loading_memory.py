"""What loading costs a host: memory beyond the module's own, and bytes read from the disk.

In processes of their own: a process's peak is that of its whole life.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from converters import load
from converters.loading import parameters
from jhessians.devices.mesh import make_mesh
from jhessians.interop.safetensors_file import write_safetensors

ALLOWED_SHARE, ALLOWED_BYTES = 0.2, 10**9  # of the checkpoint, and whatever its size

PROGRAM = """
import json, sys
sys.modules["torch"] = None  # users have none, and transformers would take it in
import jax
from converters import load
from converters.loading import parameters
from converters.reader import open_checkpoint
from jhessians.devices.hosts import start_hosts
from jhessians.devices.mesh import make_mesh

from tests.converters.test_loading_memory import digests

def bytes_read():
    return int(open("/proc/self/io").readline().split()[1])

def peak_memory():  # getrusage would tell that of the process that started this one, if larger
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

folder, warm, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
start_hosts()
kept = [t.read() for t in open_checkpoint(folder).tensors.values()] if options["hoards"] else []
mesh = make_mesh()
load(warm, mesh=mesh, fsdp=options["fsdp"])  # imports and compiles
before = bytes_read()
model = load(folder, mesh=mesh, fsdp=options["fsdp"], dtype=options["dtype"]).model
read = bytes_read() - before
arrays = {path: variable[...] for path, variable in parameters(model).items()}
shards = [shard for array in arrays.values() for shard in array.addressable_shards]
print(json.dumps({
    "read": read,
    "peak": peak_memory(),
    "held": sum(shard.data.nbytes for shard in shards),
    "digests": digests(arrays),
}))
"""


def digests(arrays):
    """What every device holds of every parameter, so that nobody has to send it."""
    return {
        path: [
            [repr(shard.index), hashlib.sha1(np.asarray(shard.data).tobytes()).hexdigest()]
            for shard in array.addressable_shards
        ]
        for path, array in arrays.items()
    }


def llama(folder: Path, *, hidden: int, inner: int, layers: int, vocabulary: int) -> Path:
    """A random checkpoint in bfloat16 of Llama's kind, filled by numpy a tensor at a time."""
    folder.mkdir()
    settings = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    table, square = (vocabulary, hidden), (hidden, hidden)
    block = {
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
        **{f"{name}_layernorm": (hidden,) for name in ("input", "post_attention")},
    }
    shapes = {"model.embed_tokens": table, "model.norm": (hidden,), "lm_head": table}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(0)
    values = (
        ((random.random(shape, np.float32) - 0.5) * shape[-1] ** -0.5).astype(ml_dtypes.bfloat16)
        for shape in shapes.values()
    )
    kinds = {
        f"{name}.weight": (shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in shapes.items()
    }
    write_safetensors(folder / "model.safetensors", kinds, values)
    return folder


def measured(folder, warm, *, processes=1, devices=8, fsdp=True, dtype="stored", hoards=False):
    """What each process of a load says of itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    options = json.dumps({"fsdp": fsdp, "dtype": dtype, "hoards": hoards})
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, folder, warm, options],
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(processes)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), texts
    return [json.loads(output.splitlines()[-1]) for output, _ in texts]


def with_flax(folder, **sizes):
    """A checkpoint of Hugging Face's kind, and the same one as we keep Flax modules."""
    found = {"hf": llama(folder / "hf", **sizes), "flax": folder / "flax"}
    command = ["convert", found["hf"], found["flax"], "--quiet"]
    subprocess.run([sys.executable, "-m", "jhessians", *command], check=True)
    return found


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("**/*") if path.is_file())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return with_flax(tmp_path_factory.mktemp("tiny"), hidden=64, inner=128, layers=1, vocabulary=64)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """1.1 GB; as float32, 2.2 GB."""
    folder = tmp_path_factory.mktemp("large")
    yield with_flax(folder, hidden=1536, inner=5120, layers=14, vocabulary=32768)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("kind", "dtype"), [
    ("hf", "bfloat16"), ("flax", "float32"),
    pytest.param("hf", "float32", marks=pytest.mark.slow),
    pytest.param("flax", "bfloat16", marks=pytest.mark.slow),
])  # fmt: skip
def test_peak_memory_of_a_large_checkpoint(large, tiny, kind, dtype, record_property):
    (found,) = measured(large[kind], tiny[kind], dtype=dtype)
    size = size_of(large["hf"])
    assert size > 10**9 and found["held"] > 10**9
    record_property("beyond the module, bytes", found["peak"] - found["held"])
    assert found["peak"] - found["held"] < ALLOWED_SHARE * size + ALLOWED_BYTES


def test_peak_memory_of_a_loader_that_keeps_what_it_read(large, tiny):
    (found,) = measured(large["hf"], tiny["hf"], hoards=True)
    size = size_of(large["hf"])
    assert found["peak"] - found["held"] > ALLOWED_SHARE * size + ALLOWED_BYTES


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """22 MB, of which vectors are a thousandth."""
    folder = tmp_path_factory.mktemp("medium")
    return with_flax(folder, hidden=512, inner=1280, layers=3, vocabulary=1000)


@pytest.mark.parametrize("kind", ["hf", "flax"])
def test_each_host_reads_what_its_devices_hold(medium, tiny, kind, record_property):
    size = size_of(medium[kind])
    hosts = measured(medium[kind], tiny[kind], processes=2, devices=2)
    for host in hosts:
        record_property("share of the files that is read", host["read"] / size)
        assert 0.49 <= host["read"] / size < 0.53
    model = load(medium["hf"], dtype="stored", mesh=make_mesh(4), fsdp=True).model
    expected = digests({path: variable[...] for path, variable in parameters(model).items()})
    for path, parts in expected.items():
        found = [part for host in hosts for part in host["digests"][path]]
        assert sorted(found) == sorted(parts), path


def test_a_host_that_holds_everything_reads_everything_once(medium, tiny):
    (host,) = measured(medium["hf"], tiny["hf"], devices=2, fsdp=False)
    assert 1 <= host["read"] / size_of(medium["hf"]) < 1.01
