"""Four hosts between the passes: the numbers of one, and each has what it works on, no more."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jhessians.fitting.eigensolver import Task, rounds
from jhessians.fitting.memory import EIGENDECOMPOSITION
from jhessians.linalg.symmetric import block_bounds
from tests import small
from tests.fitting import moving_worker
from tests.fitting.moving_worker import HEAD, NARROW, WIDE

ROOT = Path(__file__).parents[2]
HOSTS, LAYERS, DEVICES = 4, 22, 8


def run(count: int, folder: Path) -> list[dict]:
    """What each of so many processes says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "XLA_FLAGS": small.xla_flags(DEVICES // count),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # What is freed goes back to the system at once, so that a peak is one of what is needed.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", moving_worker.__name__, port, str(count), str(process),
             str(folder), str(LAYERS)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(count)
    ]  # fmt: skip
    try:
        found = []
        for worker in workers:
            output, errors = worker.communicate(timeout=240)
            assert worker.returncode == 0, errors
            found.append(json.loads(output.splitlines()[-1]))
        return found
    finally:
        for worker in workers:
            worker.kill()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    return run(HOSTS, folder), folder


def packed_bytes(d: int) -> int:
    """Of a packed matrix, rows padded to a multiple of the devices."""
    return sum(
        4 * (stop - start + -(stop - start) % DEVICES) * (d - start)
        for start, stop in block_bounds(d)
    )


def test_every_matrix_is_brought_to_one_host(hosts):
    said, _ = hosts
    total = LAYERS * (packed_bytes(WIDE) + packed_bytes(NARROW)) + 2 * packed_bytes(HEAD)
    assert sum(each["brought"] for each in said) == total
    for each in said:  # 22 matrices are not divided evenly among 4 hosts
        assert 0.85 * total / HOSTS < each["brought"] < 1.15 * total / HOSTS
        # All hosts get eigenvalues, and nothing else; nor does anybody get more for the files.
        assert 0 < each["gathered"] <= 4 * WIDE and each["gathered_in_all"] <= 4 * WIDE


def test_a_host_has_what_it_works_on(hosts, record_property):
    """Beside its devices' share: matrices in the solver, and those on their way."""
    said, _ = hosts
    vectors = 4 * LAYERS * (WIDE**2 + NARROW**2)
    workers = len(os.sched_getaffinity(0))
    # In the solver; read ahead and done; sent, received and in rows.
    working = workers * EIGENDECOMPOSITION + 4 * (workers + 1) + 4 * 5
    allowed = vectors // HOSTS + working * WIDE**2 + (16 << 20)
    record_property("bytes", [each["grew"] for each in said])
    record_property("allowed", allowed)
    assert allowed < vectors // HOSTS + 4 * LAYERS * WIDE**2 * 2  # a stack, and a copy of it
    for each in said:
        assert vectors // HOSTS < each["grew"] < allowed, (each["grew"], allowed)


def test_the_numbers_are_those_of_one_host(hosts, tmp_path):
    said, folder = hosts
    (alone,) = run(1, tmp_path)
    assert {each["values"] for each in said} == {alone["values"]}
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    assert len(files) == 2 * 7
    for file in files:
        one, four = load_file(tmp_path / file), load_file(folder / file)
        assert list(one) == list(four)
        for name, array in one.items():
            np.testing.assert_array_equal(four[name], array, err_msg=f"{file} {name}")


def test_rounds_give_each_host_one_matrix_of_one_size():
    dimensions = [9] * 6 + [5] * 7 + [2] * 5
    tasks = [Task(str(number), d, 1) for number, d in enumerate(dimensions)]
    found = rounds(tasks, 4)
    assert [each.number for among in found for each in among] == list(range(len(tasks)))
    for among in found:
        assert len({each.host for each in among}) == len(among) <= 4
        assert len({each.task.dimension for each in among}) == 1
    costs = Counter()
    for among in found:
        for each in among:
            costs[each.host] += each.task.dimension**3
    assert max(costs.values()) <= 1.1 * sum(costs.values()) / 4 + 9**3 / 2
    assert [[each.number for each in among] for among in rounds(tasks[:2], 1)] == [[0], [1]]
