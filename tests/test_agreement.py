"""Hosts that don't agree, don't come, hang or die: all end, soon, each with one line that says why.

Two processes on one machine are two hosts.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jhessians.interop.rundir import STATE
from tests.oracles import checkpoints
from tests.test_hosts import SIZES, Hosts, arguments, the_error

HERE = f"(host {socket.gethostname()})"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = checkpoints.build("gpt2", tmp_path_factory.mktemp("hosts") / "gpt2", seed=1, **SIZES)
    checkpoints.corpus(folder, 13, lengths=(24, 9, 2, 1, 17, 30))
    return folder


def changed(model: Path, folder: Path, name: str, index) -> Path:
    """The model with one weight changed, by no more than training would in a step."""
    shutil.copytree(model, folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors[name][index] *= np.float32(1.001)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def refused(*commands: list[str], **options) -> list[str]:
    """The line with which each ends."""
    with Hosts(*commands, devices=1, **options) as hosts:
        results = hosts.finish(60)
    assert [code for code, _, _ in results] == [1] * len(commands), results
    return [the_error(text) for _, _, text in results]


def slurm(index, port):
    """What srun would set, on one machine."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


@pytest.mark.parametrize("option, first, second", [
    ("token_batch_size", 64, 32),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in [
        ("seed", 0, 1), ("method", "ekfac", "kfac"), ("precision", "fp32", "bf16"),
        ("checkpoint_minutes", 10.0, 0.0), ("num_shards", 2, 1),
    ]),
])  # fmt: skip
def test_different_options(model, tmp_path, option, first, second):
    commands = [arguments(tmp_path / "run", model, f"--{option}={value}")
                for value in (first, second)]  # fmt: skip
    start = time.monotonic()
    for line in refused(*commands, environment=slurm):
        assert f"--{option} differs between the 2 processes of this run: " in line
        second_words = f"{json.dumps(second)} on process 1 {HERE}"
        assert f"{second_words}, {json.dumps(first)} on process 0 {HERE}; give all of" in line
    assert time.monotonic() - start < 30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [
    pytest.param(["--fsdp"], id="spread"),
    pytest.param([], id="copied", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("index", [
    pytest.param((-1, -1), id="last"), pytest.param((0, 0), id="first", marks=pytest.mark.slow),
])  # fmt: skip
def test_different_weights(model, tmp_path, flags, index):
    """One weight of one host's files, which one host alone reads where they are spread."""
    other = changed(model, tmp_path / "other", "transformer.h.1.mlp.c_fc.weight", index)
    same = model / "docs.jsonl"
    commands = [arguments(tmp_path / "run", each, *flags, data=same) for each in (model, other)]
    for line in refused(*commands):
        assert "weights differ between the 2 processes" in line
        assert f"process 1 {HERE} has others than process 0 {HERE}; give all of them" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["build", "convert", "score", "hessian"])
def test_every_command(model, tmp_path, name):
    other = changed(model, tmp_path / "other", "transformer.wte.weight", (5, 5))
    data = model / "docs.jsonl"
    if name == "convert":
        commands = [[str(each), str(tmp_path / "run")] for each in (model, other)]
    elif name == "build":
        commands = [[str(tmp_path / "run"), f"--model={each}", f"--dataset={data}"]
                    for each in (model, other)]  # fmt: skip
    elif name == "score":
        query = checkpoints.corpus(model, 3, seed=7, lengths=(8, 30, 17), name="query.jsonl")
        flags = [str(tmp_path / "run"), "--hessian=none", f"--query={query}", f"--dataset={data}"]
        commands = [[*flags, f"--model={each}"] for each in (model, other)]
    else:
        runs = [tmp_path / "a", tmp_path / "b"]
        for run in runs:
            with Hosts(arguments(run, model), devices=1) as hosts:
                assert hosts.finish()[0][0] == 0
        commands = [[str(tmp_path / "run"), f"--hessian={run}", f"--query={data}"] for run in runs]
    for line in refused(*commands, name="score" if name == "hessian" else name):
        what = "Hessians" if name == "hessian" else "weights"
        assert f"{what} differ between the 2 processes" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_different_code(model, tmp_path):
    copy, root = tmp_path / "copy", Path(__file__).parent.parent
    for package in ("jhessians", "converters"):
        shutil.copytree(root / package, copy / package)
    with (copy / "jhessians" / "linalg" / "eigen.py").open("a") as file:
        file.write("\n")
    command = arguments(tmp_path / "run", model)

    def environment(index, port):
        variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
        where = {"PYTHONPATH": str((root, copy)[index]), "PYTHONSAFEPATH": "1"}
        return variables | where | {"JAX_PROCESS_ID": str(index)}

    for line in refused(command, command, environment=environment):
        assert "sources of jhessians differ between the 2 processes" in line


def test_a_folder_that_hosts_do_not_share(model, tmp_path):
    """Each host has a working directory of its own."""
    for host in ("0", "1"):
        (tmp_path / host).mkdir()
    command = arguments(Path("run"), model)
    into = f"cd {tmp_path}/$JAX_PROCESS_ID;"
    for line in refused(command, command, shell=into):
        assert f"process 1 {HERE} doesn't see what process 0 {HERE} writes into " in line
        assert "run.part; give a folder that all hosts share, or --checkpoint_minutes 0" in line
    assert [list((tmp_path / host).iterdir()) for host in ("0", "1")] == [[], []]


@pytest.mark.slow
def test_a_folder_that_hosts_need_not_share(model, tmp_path):
    for host in ("0", "1"):
        (tmp_path / host).mkdir()
    command = arguments(Path("run"), model, "--checkpoint_minutes=0")
    with Hosts(command, command, devices=1, shell=f"cd {tmp_path}/$JAX_PROCESS_ID;") as hosts:
        results = hosts.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    assert [os.listdir(tmp_path / host) for host in ("0", "1")] == [["run"], []]


@contextmanager
def one_process(model, tmp_path, index, address, *flags):
    command = arguments(tmp_path / "run", model, "--join_minutes=0.05", *flags)
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
                 "JAX_PROCESS_ID": str(index), "JAX_PLATFORMS": "cpu"}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "jhessians", "compute", *command],
        env=os.environ | variables, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("index", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_nobody_else_comes(model, tmp_path, index):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with one_process(model, tmp_path, index, address) as process:
        _, text = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - start < 30
    line = the_error(text)
    assert "for 3 s (--join_minutes)" in line and len(text.splitlines()) == 1, text
    if index == 1:
        assert f"waits for process 0, which doesn't answer at {address}" in line
    else:
        assert f"process 0 of 2 (the environment) waits at {address} for the other 1" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_coordinator_that_listens_and_never_answers(model, tmp_path):
    """And a process that waits for it hears SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with one_process(model, tmp_path, 1, address) as process:
            _, text = process.communicate(timeout=60)
        assert process.returncode == 1 and len(text.splitlines()) == 1, text
        assert f"waits for the others; the coordinator at {address} is there for" in the_error(text)
        with one_process(model, tmp_path, 1, address, "--join_minutes=60") as process:
            time.sleep(8)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, text = process.communicate(timeout=60)
        assert process.returncode == 143 and time.monotonic() - start < 20
        assert "terminated by SIGTERM" in the_error(text)


def started(model, tmp_path, *flags) -> Hosts:
    """Two processes in the middle of their covariances."""
    command = arguments(
        tmp_path / "run", model, "--max_tokens=30000000", "--use_dataset_labels",
        "--token_batch_size=64", *flags,
    )  # fmt: skip
    hosts = Hosts(command, command, devices=1)
    for line in hosts.processes[0].stderr:
        if line.startswith("Covariances"):
            break
    time.sleep(3)
    return hosts


def test_a_process_that_hangs(model, tmp_path):
    """The others say where it is; and one that waits for it hears SIGTERM before that."""
    with started(model, tmp_path, "--timeout_minutes=0.1", "--checkpoint_minutes=0") as hosts:
        hosts.processes[1].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        code, _, text = hosts.finish_one(0, 60)
        assert code == 1 and 5 < time.monotonic() - start < 40
        line = the_error(text)
        assert "no process of this run has moved for 6 s (--timeout_minutes): " in line
        assert f"process 1 {HERE} is silent since Covariances, batch " in line
        assert f"process 0 {HERE} waits in Covariances, batch " in line
        hosts.processes[1].send_signal(signal.SIGCONT)
        code, _, text = hosts.finish_one(1, 60)
        assert code == 1 and "no process of this run has moved" in the_error(text)


@pytest.mark.slow
def test_the_first_process_hangs(model, tmp_path):
    with started(model, tmp_path, "--timeout_minutes=0.1") as hosts:
        hosts.processes[0].send_signal(signal.SIGSTOP)
        code, _, text = hosts.finish_one(1, 60)
        assert code == 1 and f"process 0 {HERE} is silent since its work" in the_error(text)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sigterm_while_another_hangs(model, tmp_path, victim):
    with started(model, tmp_path, "--grace_seconds=2") as hosts:
        hosts.processes[1 - victim].send_signal(signal.SIGSTOP)
        time.sleep(2)
        start = time.monotonic()
        hosts.processes[victim].send_signal(signal.SIGTERM)
        code, _, text = hosts.finish_one(victim, 60)
        assert code == 143 and time.monotonic() - start < 20, text
        assert "terminated by SIGTERM" in the_error(text)
        hosts.processes[1 - victim].send_signal(signal.SIGCONT)
        code, _, text = hosts.finish_one(1 - victim, 60)
        require_named(victim, code, text)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed(model, tmp_path, victim):
    with started(model, tmp_path, "--checkpoint_minutes=0.01") as hosts:
        end, state = time.monotonic() + 60, tmp_path / "run.part" / STATE
        while not any(path.name.isdigit() for path in state.glob("*/*")):
            assert time.monotonic() < end
            time.sleep(0.1)
        start = time.monotonic()
        hosts.processes[victim].kill()
        code, _, text = hosts.finish_one(1 - victim, 60)
        assert time.monotonic() - start < 60
        require_named(victim, code, text)
        assert "pass --resume to go on with what is saved in" in the_error(text)


def require_named(victim, code, text):
    """One line that names the process which is gone, and nothing of JAX's own threads."""
    line = the_error(text)
    assert code == 1 and f"process {victim} {HERE} of this run ended" in line, text
    assert "Check failure" not in text and "coordination" not in text, text
    assert text.splitlines()[-1] == line
