"""Two processes of which one is killed, or asked to end: the other says so, and both go on."""

import random
import shutil
import signal
import socket
import time

import pytest

from jhessians.interop.rundir import STATE
from tests.chaos.harness import contents
from tests.oracles import checkpoints
from tests.test_hosts import SIZES, Hosts, arguments, the_error

FLAGS = ["--max_tokens=10000", "--token_batch_size=64", "--checkpoint_minutes=0.01", "--resume"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = checkpoints.build("gpt2", tmp_path_factory.mktemp("chaos") / "gpt2", seed=1, **SIZES)
    checkpoints.corpus(folder, 13, lengths=(24, 9, 2, 1, 17, 30))
    return folder


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("whole") / "run", model).whole()


class Pair:
    """A run of two processes, begun again and again."""

    def __init__(self, run, model):
        self.run, self.part = run, run.with_suffix(".part")
        self.command = arguments(run, model, *FLAGS)

    def start(self):
        return Hosts(self.command, self.command, devices=1)

    def states(self):
        return {p for p in (self.part / STATE).glob("*/*") if p.name.isdigit()}

    def whole(self):
        """What they write, how many seconds after the state's folder, and what they say."""
        with self.start() as hosts:
            self.wait(lambda: (self.part / STATE).is_dir())
            start = time.monotonic()
            results = hosts.finish(100)
        assert [code for code, _, _ in results] == [0, 0], results
        return contents(self.run), time.monotonic() - start, results[0][2]

    def end_after_a_save(self, victim, number):
        """Send a signal once there is a new state; what became of both."""
        before = self.states()
        with self.start() as hosts:
            self.wait(lambda: self.states() - before)
            hosts.processes[victim].send_signal(number)
            results = hosts.finish(60)
        assert not self.run.exists() and self.states(), results
        return results

    def wait(self, condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)


def require_named(victim, code, text):
    """The survivor's end is one line of ours."""
    name = f"error: process {victim} (host {socket.gethostname()}) of this run ended"
    assert code == 1 and name in the_error(text), text
    assert "; pass --resume to go on with what is saved in" in text, text


def same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("numbers", [
    [(1, signal.SIGKILL), (0, signal.SIGTERM)],
    pytest.param([(0, signal.SIGKILL), (1, signal.SIGTERM)], marks=pytest.mark.slow),
])  # fmt: skip
def test_both_go_on(model, whole, tmp_path, numbers):
    pair = Pair(tmp_path / "run", model)
    for victim, number in numbers:
        results = pair.end_after_a_save(victim, number)
        if number == signal.SIGKILL:
            require_named(victim, results[1 - victim][0], results[1 - victim][2])
        else:
            assert [code for code, _, _ in results] == [143, 143], results
            said = "terminated by SIGTERM; pass --resume to go on with what is saved in"
            assert all(said in text for _, _, text in results), results
    found, _, text = pair.whole()
    assert "Continues from what was saved" in text
    same(found, whole[0])


@pytest.mark.slow
def test_many_kills_of_either(model, whole, tmp_path):
    expected, seconds, _ = whole
    pair = Pair(tmp_path / "run", model)
    for seed in range(10):
        choose = random.Random(seed)
        victim, later = choose.randrange(2), choose.uniform(0, seconds)
        with pair.start() as hosts:
            pair.wait(lambda: (pair.part / STATE).is_dir())
            time.sleep(later)
            hosts.processes[victim].kill()
            start = time.monotonic()
            results = hosts.finish(100)
            ended = time.monotonic() - start
        code, _, text = results[1 - victim]
        states = len(pair.states())
        if pair.run.exists():
            found = contents(pair.run)
        else:
            assert code != 0 and ended < 60, (seed, victim, later, ended, results)
            found = pair.whole()[0]
        print(f"{seed=} {victim=} {later=:.2f} {code=} {ended=:.2f} {states=}")
        same(found, expected)
        shutil.rmtree(pair.run)
