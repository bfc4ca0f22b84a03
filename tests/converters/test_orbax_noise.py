"""What Orbax prints of an error is kept back, and nothing else, and no longer than it takes."""

import logging
import sys
from types import SimpleNamespace

import pytest

from converters import load, orbax_noise, save_flax
from jhessians.errors import CheckpointError


@pytest.fixture
def heard(monkeypatch):
    """What reaches a hook that stood there before; it must stand there again at the end."""
    seen = []

    def hook(what):
        seen.append(str(what.exc_value))

    monkeypatch.setattr(sys, "unraisablehook", hook)
    yield seen
    assert sys.unraisablehook is hook
    assert not any(logging.getLogger(name).disabled for name in ("absl", "asyncio"))


def complain(text, file="elsewhere.py"):
    code = SimpleNamespace(co_filename=file)
    sys.unraisablehook(
        SimpleNamespace(exc_value=RuntimeError(text), object=SimpleNamespace(cr_code=code))
    )


def test_only_orbaxs_complaints_are_kept_back(heard):
    with orbax_noise.quietly():
        complain("Event loop is closed")
        complain("never awaited", "site-packages/orbax/checkpoint/x.py")
        complain("somebody else's")
        assert logging.getLogger("absl").disabled
    complain("Event loop is closed")
    assert heard == ["somebody else's", "Event loop is closed"]


class Unfinished:
    """Complains when it is thrown away."""

    def __del__(self):
        raise RuntimeError("Event loop is closed")


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_error_takes_its_complaints_with_it(heard, kind):
    def fail():
        unfinished = Unfinished()
        raise kind(str(type(unfinished)))

    with pytest.raises(kind) as error, orbax_noise.quietly(), orbax_noise.quietly():
        fail()
    assert heard == [] and error.traceback[-1].name == "fail"


def test_one_that_is_not_let_go_of_complains_later(heard, monkeypatch):
    """The wrong twin: the error still holds what is unfinished."""
    monkeypatch.setattr(orbax_noise, "_let_go", lambda error: None)

    def fail():
        unfinished = Unfinished()
        raise ValueError(str(type(unfinished)))

    try:
        with orbax_noise.quietly():
            fail()
    except ValueError as error:
        assert heard == []
        del error
    assert heard == ["Event loop is closed"]


@pytest.mark.parametrize("place", ["gc.collect", "time.sleep"])
def test_ctrl_c_while_waiting_for_the_last_complaint(heard, monkeypatch, place):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    with pytest.raises(KeyboardInterrupt), orbax_noise.quietly():
        raise ValueError


def test_damaged_folders_and_writes_that_fail(heard, checkpoint, tmp_path, monkeypatch):
    import orbax.checkpoint

    loaded = load(checkpoint("gpt2"))
    save_flax(loaded, tmp_path / "flax")
    (tmp_path / "flax" / "parameters" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"parameters/manifest\.ocdbt is missing"):
        load(tmp_path / "flax")
    (tmp_path / "flax" / "manifest.json").unlink()  # as earlier versions left it
    with pytest.raises(CheckpointError, match="can't be read as a Flax checkpoint"):
        load(tmp_path / "flax")

    def fail(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(orbax.checkpoint.Checkpointer, "save", fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        save_flax(loaded, tmp_path / "other")
    assert not (tmp_path / "other").exists()
