"""Streams that fail and interrupts at odd moments: the work goes on, or ends in one line."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest

from jhessians.cli.main import main
from jhessians.cli.signals import Terminated, unwound_by_signals
from jhessians.report.progress import Progress
from tests.cli.work import SUMMARY, only_error


class Failing(io.StringIO):
    """A stream that takes nothing."""

    number = errno.ENOSPC

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))

    def flush(self):
        self.write("")


class Left(Failing):
    """One whose reader has left; Python makes a BrokenPipeError of it."""

    number = errno.EPIPE


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [Failing, Left, closed, lambda: None],
                         ids=["full", "left", "closed", "none"])  # fmt: skip
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_fit_outlasts_its_streams(pipeline, monkeypatch, name, make):
    def body(config):
        progress = Progress()
        with progress.stage("Covariances", total=10, unit="positions") as stage:
            stage.advance(10)
        progress.warn("odd")
        return SUMMARY

    pipeline.body = body
    stream = make()
    monkeypatch.setattr(sys, name, stream)
    assert main(["compute", "r"]) == 0
    assert getattr(sys, name) is stream
    assert main(["compute", "r", "--seed", "-1"]) == 2


def test_what_is_all_that_was_asked_for_must_be_said(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing())
    assert main(["--version"]) == 1
    monkeypatch.undo()
    assert "cannot write to standard output: No space left" in only_error(capsys)
    monkeypatch.setattr(sys, "stdout", Left())
    assert main(["--version"]) == 0


def test_what_a_stream_cannot_encode_is_escaped(pipeline, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    assert main(["compute", "r", "--modules", "λ", "--sead", "→"]) == 2
    assert main(["→"]) == 2
    sys.stderr.flush()
    assert b"unknown command '\\u2192'" in raw.getvalue()


def shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        f"set -o pipefail; {line}", shell=True, executable="/bin/bash",
        capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_process_without_streams(streams):
    assert shell(f"$PYTHON -m jhessians --version {streams}").returncode == 0


def test_a_full_device_is_an_error_only_once():
    done = shell("$PYTHON -m jhessians --version >/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("jhessians: error: cannot write to standard output")
    assert done.stderr.count("\n") == 1


def test_files_never_take_the_place_of_a_closed_stream():
    take = "from jhessians.cli.streams import take_standard_places as t; t(); import os"
    program = f"{take}; os._exit(os.open(os.devnull, 0) >= 3)"
    assert shell(f"$PYTHON -c '{program}' <&- >&- 2>&-").returncode == 1


INTERRUPTED_IMPORT = """
import signal, sys, runpy
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "jhessians.cli.parsers":
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:  # as numpy's C code does
                raise ImportError("half imported")
sys.meta_path.insert(0, Finder())
runpy.run_module("jhessians", run_name="__main__")
"""


def test_an_interrupt_while_the_program_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "jhessians: error: interrupted\n")


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_is_not_lost_in_an_import(tmp_path, monkeypatch, number, error):
    (tmp_path / "swallowing_module.py").write_text(
        f"import signal\ntry:\n    signal.raise_signal({int(number)})\nexcept BaseException: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error), unwound_by_signals():
            import swallowing_module  # noqa: F401

            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)
        sys.modules.pop("swallowing_module", None)


def test_a_signal_is_not_lost_in_a_weak_reference():
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Terminated), unwound_by_signals():
        del thing
        time.sleep(10)
    assert reference() is None


def test_an_interrupt_that_looks_like_something_else(capsys, pipeline):
    def body(config):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy failed to import") from error

    pipeline.body = body
    assert main(["compute", "r"]) == 130
    assert only_error(capsys) == "jhessians: error: interrupted"
