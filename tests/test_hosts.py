"""Two processes on one machine compute what one does, and neither waits for one that failed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jhessians.commands.build.config import BuildConfig
from jhessians.commands.build.pipeline import build
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.commands.score.config import ScoreConfig
from jhessians.commands.score.pipeline import score
from jhessians.interop.gradient_store import GradientStore
from jhessians.interop.processor import GradientProcessor
from jhessians.interop.score_store import ScoreStore
from tests import small
from tests.oracles import bergson, checkpoints
from tests.small import relative_error
from tests.test_bergson import EIGENVECTORS, errors
from tests.tolerances import INVARIANCE

# With biases, dimensions of 41, 45, 46 and 120: most divide neither by 4 devices nor by 2 shards.
SIZES = {"n_embd": 40, "n_head": 2, "n_inner": 45, "n_layer": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = checkpoints.build("gpt2", tmp_path_factory.mktemp("hosts") / "gpt2", seed=1, **SIZES)
    checkpoints.corpus(folder, 13, lengths=(24, 9, 2, 1, 17, 30))
    return folder


class Hosts:
    """Processes of one run, ended together whatever happens; `shell` is run before each.

    They get what `environment` gives for their number instead of the coordinator's address.
    """

    def __init__(
        self,
        *commands: list[str],
        devices: int = 2,
        name: str = "compute",
        shell: str = "",
        environment: Callable[[int, int], dict[str, str]] | None = None,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            **os.environ,
            "XLA_FLAGS": small.xla_flags(devices),
            "JAX_PLATFORMS": "cpu",
        }
        count = str(len(commands))
        joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": count}
        given = environment or (
            lambda index, port: (joined if count != "1" else {}) | {"JAX_PROCESS_ID": str(index)}
        )
        self.processes = [
            subprocess.Popen(
                [
                    "bash",
                    "-c",
                    f'{shell} exec "$@"',
                    "bash",
                    sys.executable,
                    "-m",
                    "jhessians",
                    name,
                    *command,
                ],
                env=shared | given(index, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
            for index, command in enumerate(commands)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.communicate()

    def finish(self, timeout: float = 120) -> list[tuple[int, str, str]]:
        """Exit code, standard output and standard error of each."""
        end = time.monotonic() + timeout
        texts = [p.communicate(timeout=max(1, end - time.monotonic())) for p in self.processes]
        return [
            (process.returncode, *text) for process, text in zip(self.processes, texts, strict=True)
        ]

    def finish_one(self, index: int, timeout: float) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of one of them."""
        process = self.processes[index]
        output, text = process.communicate(timeout=timeout)
        return process.returncode, output, text


def arguments(run: Path, model: Path, *flags: str, data: Path | None = None) -> list[str]:
    dataset = data or model / "docs.jsonl"
    return [
        str(run),
        f"--model={model}",
        f"--dataset={dataset}",
        "--num_shards=2",
        "--layout=bergson",
        *flags,
    ]


def test_two_processes_compute_what_one_does(model, tmp_path, record_property):
    """Labels sampled from the model, column of ones, weights spread over both hosts' memory."""
    flags = ["--include_bias", "--fsdp", "--offload=weights"]
    options = {"model": str(model), "dataset": str(model / "docs.jsonl"), "num_shards": 2}
    config = ComputeConfig(str(tmp_path / "one"), **options, include_bias=True, world_size=1)
    compute(config)
    command = arguments(tmp_path / "two", model, *flags)
    with Hosts(command, command) as hosts:
        (code, output, errors_0), (other, silent, errors_1) = hosts.finish()
    assert (code, other) == (0, 0), errors_0 + errors_1
    assert "4 x cpu" in output and "Covariances" in errors_0
    # Gloo and JAX's coordinator may have something to say, but the second process has not.
    assert "factors" not in silent and "Covariances" not in errors_1
    one, two = bergson.read(tmp_path / "one"), bergson.read(tmp_path / "two")
    assert set(one) == set(two) and one["total_processed"] == two["total_processed"]
    for folder in set(one) - {"total_processed", "eigenvalue_correction_sharded", *EIGENVECTORS}:
        worst = max(errors(two[folder], one[folder]).values())
        record_property(folder, worst)
        assert worst < INVARIANCE, folder
    # What depends on the choice of eigenvectors, without it.
    for folder in EIGENVECTORS:
        for q in two[folder].values():
            np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=INVARIANCE * 10)
    for module, values in one["eigenvalue_correction_sharded"].items():
        total = two["eigenvalue_correction_sharded"][module].sum()
        assert abs(total / values.sum() - 1) < INVARIANCE, module
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_two_processes_score_as_one_does(model, tmp_path):
    """Queries and documents, spread over both; the lists are written once."""
    options = {"model": str(model), "dataset": str(model / "docs.jsonl")}
    compute(ComputeConfig(str(tmp_path / "run"), **options, world_size=1, quiet=True))
    query = checkpoints.corpus(model, 3, seed=7, lengths=(8, 30, 17), name="query.jsonl")
    options = {"hessian": str(tmp_path / "run"), "query": str(query), "normalize": "root_self"}
    score(ScoreConfig(run_path=str(tmp_path / "one"), **options, world_size=1, quiet=True))
    flags = [f"--{option}={value}" for option, value in options.items()]
    command = [str(tmp_path / "two"), *flags, "--query_batch_size", "2", "--fsdp"]
    with Hosts(command, command, name="score") as hosts:
        (code, output, errors_0), (other, silent, errors_1) = hosts.finish()
    assert (code, other) == (0, 0), errors_0 + errors_1
    assert "Scores of 13 documents for 3 queries" in output and "Scores" not in silent
    one, two = (ScoreStore(tmp_path / name).read_all() for name in ("one", "two"))
    assert relative_error(two, one) < INVARIANCE * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "run", "two"]


STORES = {
    "projected": {"projection_dim": 4, "include_bias": True, "fsdp": True},
    "tokens": {"projection_dim": 4, "attribute_tokens": True},
    "mean": {"projection_dim": 4, "aggregation": "mean", "normalizer": "adam"},
    "unit": {"unit_normalize": True, "max_batch_size": 1},
    "global": {"projection_dim": 9, "projection_target": "global"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "projected" else pytest.mark.slow) for n in STORES]
)
def test_two_processes_build_what_one_does(model, tmp_path, name):
    """The first one writes all rows, those of documents that the other read too."""
    options = {"model": str(model), "dataset": str(model / "docs.jsonl"), **STORES[name]}
    build(BuildConfig(str(tmp_path / "one"), **options, world_size=1, quiet=True))
    flags = [f"--{option}={str(value).lower() if value is True else value}"
             for option, value in options.items()]  # fmt: skip
    command = [str(tmp_path / "two"), *flags]
    with Hosts(command, command, name="build") as hosts:
        (code, output, errors_0), (other, silent, errors_1) = hosts.finish()
    assert (code, other) == (0, 0), errors_0 + errors_1
    assert "gradients" in output and "gradients" not in silent
    one, two = (GradientStore(tmp_path / run) for run in ("one", "two"))
    assert two.sizes == one.sizes and np.abs(one.matrix).max() > 0
    assert relative_error(two.matrix, one.matrix) < INVARIANCE * 10
    for file in ("info.json", "processor_config.yaml"):
        assert (tmp_path / "two" / file).read_text() == (tmp_path / "one" / file).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_disk_that_fills_up_on_the_writing_host_ends_both(model, tmp_path):
    command = [str(tmp_path / "run"), f"--model={model}", f"--dataset={model / 'docs.jsonl'}"]
    with Hosts(command, command, devices=1, name="build", shell="ulimit -f 200;") as hosts:
        (code, _, text), (other, _, _) = hosts.finish(90)
    assert code == 1 and "cannot write" in the_error(text) and "beyond the limit" in text
    assert other != 0  # where the first process ends first, JAX itself ends it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tkfac", "shampoo", "autocorrelation", "global"])
def test_every_method_on_two_processes(model, tmp_path, method):
    options: dict[str, Any] = {"method": method}
    if method in ("autocorrelation", "global"):
        target = "global" if method == "global" else "per_module"
        options = {"method": "autocorrelation", "projection_dim": 4, "projection_target": target}
    else:
        options["num_shards"] = 2
    options |= {"model": str(model), "dataset": str(model / "docs.jsonl"), "layout": "bergson"}
    config = ComputeConfig(str(tmp_path / "one"), **options, world_size=1)
    compute(config)
    command = [str(tmp_path / "two"), *(f"--{name}={value}" for name, value in options.items())]
    with Hosts(command, command) as hosts:
        (code, _, errors_0), (other, _, errors_1) = hosts.finish()
    assert (code, other) == (0, 0), errors_0 + errors_1
    if options["method"] == "autocorrelation":
        one, two = (GradientProcessor.load(tmp_path / run).hessians for run in ("one", "two"))
        assert max(errors(two, one).values()) < INVARIANCE
        return
    one, two = bergson.read(tmp_path / "one"), bergson.read(tmp_path / "two")
    for folder in ("activation_sharded", "gradient_sharded", "eigenvalue_sharded"):
        assert max(errors(two[folder], one[folder]).values()) < INVARIANCE, folder


def the_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("jhessians: error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def test_bad_data_on_one_host_ends_both(model, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": ""}\n')
    commands = [arguments(tmp_path / "run", model), arguments(tmp_path / "run", model, data=bad)]
    with Hosts(*commands, devices=1) as hosts:
        (code, _, errors_0), (other, _, errors_1) = hosts.finish(60)
    assert (code, other) == (1, 1), errors_0 + errors_1
    assert "fewer than 2 tokens" in the_error(errors_1)
    assert "process 1 failed" in the_error(errors_0)
    assert "fewer than 2 tokens" in the_error(errors_0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_different_data_on_two_hosts_is_refused(model, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text((model / "docs.jsonl").read_text() * 2)
    commands = [arguments(tmp_path / "run", model), arguments(tmp_path / "run", model, data=other)]
    with Hosts(*commands, devices=1) as hosts:
        for code, _, text in hosts.finish(60):
            assert code == 1 and "differ between the 2 processes" in the_error(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.jsonl"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_does_not_leave_the_other_waiting(model, tmp_path, victim):
    command = arguments(
        tmp_path / "run",
        model,
        "--max_tokens=30000000",
        "--use_dataset_labels",
        "--checkpoint_minutes=0",
    )
    with Hosts(command, command, devices=1) as hosts:
        for line in hosts.processes[0].stderr:
            if line.startswith("Covariances"):
                break
        time.sleep(3)
        hosts.processes[victim].send_signal(signal.SIGTERM)
        results = hosts.finish(60)
    assert results[victim][0] == 143, results[victim][2]
    code, _, text = results[1 - victim]
    assert code == 1 and f"process {victim} (host" in the_error(text)


def test_a_host_that_cannot_join_says_so(model, tmp_path):
    environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_PROCESS_ID": "one"}
    done = subprocess.run(
        [sys.executable, "-m", "jhessians", "compute", *arguments(tmp_path / "run", model)],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "JAX_PROCESS_ID is 'one'; expected a whole number" in the_error(done.stderr)
