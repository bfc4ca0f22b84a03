"""Processes that watch each other over a network of which one side vanishes, as in a power cut."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
from jhessians.devices.watch import watch
index, folder, end = int(sys.argv[1]), Path(sys.argv[2]), time.monotonic() + 20

def exchange(line):
    (folder / f"{index}.part").write_text(line)
    (folder / f"{index}.part").rename(folder / str(index))
    while not all((folder / each).exists() for each in "01"):
        assert time.monotonic() < end
        time.sleep(0.05)
    return [(folder / each).read_text() for each in "01"]

watch(index, 2, "10.231.7.1", exchange, float("inf"))
print("watching", flush=True)
time.sleep(600)
"""


@pytest.fixture
def network():
    """Two name spaces with a cable between them; gives their names and their ends of the cable."""
    if os.getuid() != 0 or not shutil.which("ip"):
        pytest.skip("only root may lay a cable")
    names = [f"jhessians{os.getpid()}{side}" for side in "ab"]
    ends = [f"jh{os.getpid() % 100000}{side}" for side in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)

    for name in names:
        if (done := ip("netns", "add", name)).returncode:
            pytest.skip(f"name spaces are not allowed here: {done.stderr}")
    try:
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.231.7.{number}/24", "dev", end)
            if (done := ip("-n", name, "link", "set", end, "up")).returncode:
                pytest.skip(f"there are no cables here: {done.stderr}")
        yield names, ends, ip
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_a_machine_that_vanishes(network, tmp_path):
    names, ends, ip = network
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", PROGRAM, str(index), str(tmp_path)],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for index, name in enumerate(names)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout.readline() == "watching\n"
        time.sleep(3)
        start = time.monotonic()
        ip("-n", names[1], "link", "set", ends[1], "down")
        for index, process in enumerate(processes):
            _, text = process.communicate(timeout=90)
            assert process.returncode == 1 and f"error: process {1 - index} (host " in text, text
            print(f"process {index} ended after {time.monotonic() - start:.0f} s")
        assert time.monotonic() - start < 60
    finally:
        for process in processes:
            process.kill()
