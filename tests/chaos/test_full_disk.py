"""A disk that fills up in the middle of a fit costs no result and leaves no half one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jhessians.interop.rundir import STATE
from tests.chaos.harness import contents
from tests.oracles import checkpoints
from tests.test_hosts import SIZES, the_error

MOUNT = 'mount -t tmpfs -o size=32m none "$0" && echo mounted && exec sleep 600'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = checkpoints.build("gpt2", tmp_path_factory.mktemp("disk") / "gpt2", seed=1, **SIZES)
    checkpoints.corpus(folder, 13, lengths=(24, 9, 2, 1, 17, 30))
    return folder


class Disk:
    """A small disk of its own, in a name space of mounts that ends with its process."""

    def __init__(self, mount: Path, model: Path):
        self._process = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", MOUNT, str(mount)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._enter = ["nsenter", "-m", "-t", str(self._process.pid)]
        self.is_there = self._process.stdout.readline() == "mounted\n"
        self.folder = Path(f"/proc/{self._process.pid}/root{mount}")
        self._words = [
            sys.executable, "-m", "jhessians", "compute", str(mount / "run"), "--model", str(model),
            "--dataset", str(model / "docs.jsonl"), "--token_batch_size", "64",
            "--max_tokens", "160000", "--checkpoint_minutes", "0.01", "--world_size", "1",
        ]  # fmt: skip

    def close(self):
        self._process.kill()
        self._process.communicate()

    def start(self, *flags: str, log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(
                [*self._enter, *self._words, *flags], stderr=file, stdout=subprocess.DEVNULL
            )

    def states(self) -> list[Path]:
        return [p for p in (self.folder / "run.part" / STATE).glob("*/*") if p.name.isdigit()]

    def fill(self) -> None:
        with (self.folder / "ballast").open("ab", buffering=0) as file:
            try:
                while file.write(bytes(1 << 12)):
                    pass
            except OSError:
                pass

    def free(self) -> None:
        (self.folder / "ballast").unlink()


@pytest.fixture
def disk(model, tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root may mount a disk")
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk", model)
    if not disk.is_there:
        disk.close()
        pytest.skip("mounts are not allowed here")
    yield disk
    disk.close()


def test_a_disk_that_fills_up_and_is_freed(disk, tmp_path):
    log = tmp_path / "log"
    # To its end, with a disk that is full for a while: only the state can't be saved.
    run = disk.start(log=log)
    fill_after_a_save(disk, run, lambda: "state can't be saved" in log.read_text())
    assert "run" not in os.listdir(disk.folder)
    disk.free()
    assert run.wait(180) == 0, log.read_text()
    assert "error" not in log.read_text() and "the run goes on" in log.read_text()
    expected = contents(disk.folder / "run")
    # One that stays full ends the run, which goes on once there is space.
    run = disk.start("--overwrite", log=log)
    fill_after_a_save(disk, run, lambda: run.poll() is not None)
    assert run.returncode == 1
    line = the_error(log.read_text())
    assert "the disk is full; free some space" in line and "pass --resume to go on" in line
    assert contents(disk.folder / "run") == expected  # the earlier result
    disk.free()
    run = disk.start("--overwrite", "--resume", log=log)
    assert run.wait(180) == 0, log.read_text()
    assert "Continues from what was saved" in log.read_text()
    assert contents(disk.folder / "run") == expected
    assert os.listdir(disk.folder) == ["run"]


def fill_after_a_save(disk, run, until):
    """Keep the disk full, once a state is saved, until a condition holds."""
    end = time.monotonic() + 180
    while not disk.states() and run.poll() is None:
        time.sleep(0.01)
    while not until():
        assert time.monotonic() < end
        assert run.poll() is None or until()
        disk.fill()
        time.sleep(0.005)
