"""A run that is killed, whenever that may be, and resumed gives what an uninterrupted run gives."""

import random
import shutil
import time

import pytest

from tests.chaos import harness
from tests.oracles import checkpoints

SIZES = {"n_embd": 40, "n_head": 2, "n_inner": 45, "n_layer": 2}
METHODS = {
    "ekfac": ["--method", "ekfac"],
    "partitions": ["--method", "ekfac", "--module_partitions", "2", "--num_shards", "3"],
    "autocorrelation": ["--method", "autocorrelation", "--projection_dim", "4",
                        "--normalizer", "adam"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = checkpoints.build("gpt2", tmp_path_factory.mktemp("chaos") / "gpt2", seed=1, **SIZES)
    checkpoints.corpus(folder, 300, lengths=(24, 9, 2, 1, 17, 30))
    return folder


@pytest.fixture(scope="module")
def context():
    return harness.server()


def command(model, folder, method):
    return [
        "compute", str(folder / "run"), "--model", str(model), "--quiet",
        "--dataset", str(model / "docs.jsonl"), "--token_batch_size", "64",
        "--checkpoint_minutes", "0.01", *METHODS[method],
    ]  # fmt: skip


class Victims:
    """One run to its end, then others that are killed at random."""

    def __init__(self, context, model, folder, method):
        self.context, self.folder = context, folder
        self.arguments = command(model, folder, method)
        for _ in range(2):  # the first compiles
            shutil.rmtree(folder / "run", ignore_errors=True)
            start = time.monotonic()
            self.whole = harness.run(context, self.arguments, folder)
            self.seconds = time.monotonic() - start
            assert self.whole.code == 0, self.whole.output
        self.expected = harness.contents(folder / "run")
        assert len(self.expected) > 5

    def kill(self, seed):
        """Kill a run at random, resume it and compare; whether it had anything to go on from."""
        choose = random.Random(seed)
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        where = (
            {"change": choose.randrange(self.whole.changes)}
            if seed % 2
            else {"seconds": choose.uniform(0, self.seconds)}
        )
        killed = harness.run(self.context, self.arguments, self.folder, **where)
        assert killed.code == 0 or killed.code == -9, (seed, where, killed)
        if (self.folder / "run").exists():  # it was killed after it had its name
            found = harness.contents(self.folder / "run")
            resumed = False
        else:
            again = harness.run(self.context, [*self.arguments, "--resume"], self.folder)
            assert again.code == 0, (seed, where, again.output)
            found = harness.contents(self.folder / "run")
            resumed = again
        assert found.keys() == self.expected.keys(), (seed, where)
        different = [name for name in found if found[name] != self.expected[name]]
        assert not different, (seed, where, different)
        left = [p.name for p in self.folder.iterdir() if not p.name.startswith("log")]
        assert left == ["run"], (seed, where, left)
        return resumed


@pytest.mark.parametrize("method", [
    pytest.param("ekfac", marks=pytest.mark.slow),  # partitions are EKFAC's as well
    "partitions", "autocorrelation",
])  # fmt: skip
def test_killed_runs_go_on(context, model, tmp_path, method):
    victims = Victims(context, model, tmp_path, method)
    for seed in (0, 1):
        victims.kill(seed)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_many_killed_runs_go_on(context, model, tmp_path, method):
    victims = Victims(context, model, tmp_path, method)
    for seed in range(20):
        victims.kill(seed)
