"""Two processes, one result: everybody fetches, process 0 writes, and a failure is everybody's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.interop.tensors import _take_entry, _take_window
from tests import small

ROOT = Path(__file__).parents[2]

WORKER = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jhessians.errors import OutputError
from jhessians.interop.export import ArrayRows, link_or_copy, write_sharded

port, process, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
whole = np.arange(2 * 48 * 43, dtype=np.float32).reshape(2, 48, 43)
sharding = NamedSharding(mesh, P(None, "x"))
stack = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
tensors = {f"h.{layer}": ArrayRows(stack, index=layer, shape=(43, 43)) for layer in range(2)}
write_sharded(folder / "a", tensors, shards=3, dtype="fp32")
link_or_copy(folder / "a", folder / "b")
(folder / "file").touch()
try:
    write_sharded(folder / "file" / "a", tensors, shards=1, dtype="fp32")
except OutputError as error:
    print(process, error)
"""


def test_two_processes_write_one_result_and_share_a_failure(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "XLA_FLAGS": small.xla_flags(4),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": str(ROOT),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(process), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for process, worker in enumerate(workers):
            output, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors
            assert f"\n{process} cannot write" in "\n" + output, errors
            assert "a part of the path is a file" in output
    finally:
        for worker in workers:
            worker.kill()
    whole = np.arange(2 * 48 * 43, dtype=np.float32).reshape(2, 48, 43)
    for folder in ("a", "b"):
        parts = [
            safetensors.numpy.load_file(tmp_path / folder / f"shard_{r}.safetensors")
            for r in range(3)
        ]
        for layer in range(2):
            rows = np.concatenate([part[f"h.{layer}"] for part in parts])
            np.testing.assert_array_equal(rows, whole[layer, :43, :43])


def test_fetching_rows_never_gathers_a_whole_factor():
    """XLA would do so for a slice with a traced start along the sharded rows."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    stack = jax.device_put(np.zeros((3, 64, 60), np.float32), NamedSharding(mesh, P(None, "x")))
    entry = _take_entry.lower(stack, (np.int32(1),)).compile()
    assert "all-" not in entry.as_text() and "collective" not in entry.as_text()
    rows = _take_window.lower(_take_entry(stack, (np.int32(1),)), ((5, 29), (0, 60))).compile()
    assert "all-gather" not in rows.as_text()
