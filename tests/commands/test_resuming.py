"""A fit that was asked to end goes on where it stopped, if it is the same fit."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from jhessians import load_factors
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.errors import ConfigError, NumericsError, OutputError
from jhessians.fitting import checkpoints as saving
from jhessians.fitting.grace import Terminated
from jhessians.interop.manifest import read_manifest
from jhessians.interop.rundir import STATE
from tests.chaos.harness import contents
from tests.oracles import checkpoints
from tests.small import relative_error
from tests.tolerances import INVARIANCE

SIZES = {"n_embd": 24, "n_head": 2, "n_inner": 20, "n_layer": 2}
MOST = 200  # more often than a fit here asks whether to save


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = checkpoints.build("gpt2", tmp_path_factory.mktemp("saved") / "gpt2", seed=1, **SIZES)
    checkpoints.corpus(folder, 40, lengths=(24, 9, 2, 1, 17, 30))
    return folder


@pytest.fixture
def config(model, tmp_path):
    def make(name="run", **options):
        given = {
            "model": str(model),
            "dataset": str(model / "docs.jsonl"),
            "quiet": True,
            "world_size": 1,
            "token_batch_size": 32,
            "max_tokens": 400,
            "method": "ekfac",
        }
        return ComputeConfig(run_path=str(tmp_path / name), **(given | options))

    return make


class Ending:
    """Asks a run to end when it looks for the n-th time."""

    def __init__(self, monkeypatch):
        self.left = None
        monkeypatch.setattr(saving, "asked", self)

    def __call__(self):
        if self.left is None:
            return None
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else None


@pytest.fixture
def ending(monkeypatch):
    return Ending(monkeypatch)


@pytest.mark.parametrize("options", [
    {},
    {"method": "shampoo", "mc_samples": 2, "world_size": 4},
    pytest.param({"module_partitions": 2, "num_shards": 3}, marks=pytest.mark.slow),
    pytest.param(
        {"method": "autocorrelation", "projection_dim": 4, "normalizer": "adafactor"},
        marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_it_may_end_anywhere(config, ending, options, tmp_path):
    compute(config("whole", **options))
    expected = contents(tmp_path / "whole")
    ends = 0
    for look in (1, 3, 8, 18, MOST):
        ending.left = look
        try:
            compute(config(resume=True, **options))
        except Terminated as error:
            assert "`resume`" in "".join(error.__notes__)
            assert not (tmp_path / "run").exists()
            ends += 1
        else:
            break
    assert ends > 1
    found = contents(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]
    assert not (tmp_path / "run" / STATE).exists()


@pytest.fixture
def unfinished(config, ending, tmp_path):
    ending.left = 8
    with pytest.raises(Terminated):
        compute(config())
    ending.left = None
    return tmp_path / "run.part"


def test_without_resume_nothing_saved_is_deleted(config, unfinished):
    with pytest.raises(OutputError, match=r"unfinished run has saved; pass `resume`.*`overwrite`"):
        compute(config())
    assert (unfinished / STATE).is_dir()
    compute(config(overwrite=True))
    assert not unfinished.exists()


def test_there_may_be_nothing_to_resume(config, tmp_path):
    summary = compute(config(resume=True))
    assert any("this one begins anew" in note for note in summary.notes)
    assert not (tmp_path / "run.part").exists()


def test_a_resumed_run_says_from_where(config, unfinished):
    summary = compute(config(resume=True))
    assert any("Continues from what was saved of" in note for note in summary.notes)


@pytest.mark.parametrize(("options", "said"), [
    ({"seed": 3}, "`seed` is 3 and was 0"),
    ({"method": "kfac"}, "`method` is 'kfac' and was 'ekfac'"),
    ({"token_batch_size": 64}, "`token_batch_size` is 64 and was 32"),
])  # fmt: skip
def test_other_options_are_refused(config, unfinished, options, said):
    with pytest.raises(ConfigError, match=f"unfinished run of other options: {said}"):
        compute(config(resume=True, **options))
    assert (unfinished / STATE).is_dir()


def test_options_that_change_no_number_may_differ(config, unfinished, tmp_path):
    compute(config(resume=True, checkpoint_minutes=3.0, profile=True))
    assert (tmp_path / "run").is_dir()


def test_other_data_are_refused(config, unfinished, model, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text((model / "docs.jsonl").read_text().replace("1", "2", 1))
    with pytest.raises(ConfigError, match="the data set changed since"):
        compute(config(resume=True, dataset=str(other)))
    same = tmp_path / "same.jsonl"
    same.write_bytes((model / "docs.jsonl").read_bytes())
    compute(config(resume=True, dataset=str(same)))


def changed(model, folder):
    """The same model but for one weight."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] *= 1.001
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_other_weights_are_refused(config, unfinished, model, tmp_path):
    other = changed(model, tmp_path / "other")
    with pytest.raises(ConfigError, match="the model's weights changed since"):
        compute(config(resume=True, model=str(other)))


@pytest.mark.parametrize(("before", "after"), [
    pytest.param(8, 2, marks=pytest.mark.slow), (4, 2),
])  # fmt: skip
def test_fewer_devices_may_go_on(config, ending, tmp_path, before, after):
    compute(config("whole", world_size=before, token_batch_size=8 * 32 // before))
    for look in (3, 12):
        ending.left = look
        with pytest.raises(Terminated):
            compute(config(world_size=before, token_batch_size=8 * 32 // before, resume=True))
    ending.left = None
    summary = compute(config(world_size=after, token_batch_size=8 * 32 // before, resume=True))
    assert any("up to the rounding of sums" in note for note in summary.notes)
    whole, found = load_factors(tmp_path / "whole"), load_factors(tmp_path / "run")
    for kind in ("activation_covariance", "gradient_covariance", "eigenvalue_correction"):
        for name, expected in whole[kind].items():
            assert relative_error(found[kind][name], expected) < INVARIANCE, (kind, name)


def test_devices_that_do_not_divide_are_refused(config, ending, tmp_path):
    ending.left = 3
    with pytest.raises(Terminated):
        compute(config(world_size=4))
    ending.left = None
    with pytest.raises(ConfigError, match="begun on 4 devices, of which 3 is no divisor"):
        compute(config(world_size=3, resume=True))


def test_an_error_keeps_what_was_saved(config, monkeypatch, tmp_path):
    from jhessians.fitting import eigensolver

    def fails(name, *rest):
        raise NumericsError("no eigenvectors today")

    with monkeypatch.context() as patched:
        patched.setattr(eigensolver, "eigendecompose", fails)
        with pytest.raises(NumericsError) as raised:
            compute(config(checkpoint_minutes=1e-9))
    assert "pass `resume` to go on" in raised.value.__notes__[0]
    compute(config(resume=True))
    assert (tmp_path / "run").is_dir()


def test_nothing_is_saved_where_that_is_off(config, monkeypatch, tmp_path):
    from jhessians.fitting import eigensolver

    def fails(name, *rest):
        raise NumericsError("no eigenvectors today")

    monkeypatch.setattr(eigensolver, "eigendecompose", fails)
    with pytest.raises(NumericsError) as raised:
        compute(config(checkpoint_minutes=0.0))
    assert not hasattr(raised.value, "__notes__")
    assert not (tmp_path / "run.part").exists()


def test_a_damaged_state_is_passed_over(config, ending, tmp_path):
    compute(config("whole"))
    for _ in range(2):
        ending.left = 1
        with pytest.raises(Terminated):
            compute(config(resume=True))
    ending.left, unfinished = None, tmp_path / "run.part"
    newest = max((unfinished / STATE / "covariances").iterdir(), key=lambda p: int(p.name))
    for path in (newest / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * path.stat().st_size)
    summary = compute(config(resume=True))
    assert any("a saved state can't be read" in warning for warning in summary.warnings)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_state_that_cannot_be_saved_ends_nothing(config, monkeypatch, tmp_path):
    import orbax.checkpoint as ocp

    def fails(*rest, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fails)
    summary = compute(config(checkpoint_minutes=1e-9))
    assert any("can't be saved: [Errno 28]" in warning for warning in summary.warnings)
    assert (tmp_path / "run").is_dir()


def test_a_replay_says_what_changed(config, model, tmp_path, monkeypatch):
    from jhessians.cli.main import parse
    from jhessians.commands.compute import COMPUTE

    compute(config())
    inputs = read_manifest(tmp_path / "run").inputs
    assert set(inputs) == {"the data set", "the model's weights"}
    words = [str(tmp_path / "again"), "--config", str(tmp_path / "run")]
    assert not compute(parse(COMPUTE, words)).warnings
    other = changed(model, tmp_path / "other")
    words = [str(tmp_path / "third"), "--config", str(tmp_path / "run"), "--model", str(other)]
    (said,) = compute(parse(COMPUTE, words)).warnings
    assert said == "the model's weights changed since the run that is replayed"


def test_sigterm_saves_and_says_how_to_go_on(model, tmp_path):
    words = [
        sys.executable, "-m", "jhessians", "compute", str(tmp_path / "run"),
        "--model", str(model), "--dataset", str(model / "docs.jsonl"), "--layout", "bergson",
        "--token_batch_size", "32", "--checkpoint_minutes", "0.0001",
    ]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    state, end = tmp_path / "run.part" / STATE, time.monotonic() + 100
    while not list(state.glob("*/[0-9]")) and time.monotonic() < end:
        time.sleep(0.01)
    process.terminate()
    _, text = process.communicate(timeout=60)
    assert process.returncode == 143, text
    assert text.splitlines()[-1] == (
        "jhessians: error: terminated by SIGTERM; pass --resume to go on with what is saved in "
        f"{tmp_path / 'run.part'}"
    )
    again = [*words[:3], "compute", "--config", str(tmp_path / "run.part"), "--resume", "--quiet"]
    assert subprocess.run(again, timeout=100).returncode == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
