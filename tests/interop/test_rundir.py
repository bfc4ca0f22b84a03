"""A result appears whole or not at all, and what was there before is never lost."""

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from jhessians.errors import OutputError
from jhessians.interop import hold, rundir
from jhessians.interop.rundir import STATE, RunDirectory, how_to_go_on

begin = partial(RunDirectory, command="compute")


def names(folder):
    """All but what says whose a folder is."""
    own = ("manifest.json", ".run.json")
    return sorted(path.name for path in folder.iterdir() if path.name not in own)


def make(folder, text="old"):
    """An earlier result."""
    with begin(folder) as part:
        (part / "result").write_text(text)


def test_a_finished_run_gets_its_name(tmp_path):
    with begin(tmp_path / "a" / "run") as part:
        assert part == tmp_path / "a" / "run.part"
        (part / "result").write_text("new")
        assert not (tmp_path / "a" / "run").exists()
    assert names(tmp_path / "a") == ["run"]
    assert (tmp_path / "a" / "run" / "result").read_text() == "new"


def test_a_relative_path_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with begin("run/"):
        os.chdir("elsewhere")
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("stop", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_leaves_nothing_new(tmp_path, stop, overwrite):
    run = tmp_path / "run"
    if overwrite:
        make(run)
    with pytest.raises(type(stop)) as raised:
        with begin(run, overwrite) as part:
            (part / "result").write_text("new")
            raise stop
    assert raised.value is stop
    assert names(tmp_path) == (["run"] if overwrite else [])
    assert not overwrite or (run / "result").read_text() == "old"


def test_an_existing_path_is_refused_before_any_work(tmp_path):
    make(tmp_path / "run")
    with pytest.raises(OutputError, match="exists already.*`overwrite`") as raised:
        begin(tmp_path / "run").__enter__()
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(OutputError, match="is a file"):
        begin(tmp_path / "run", overwrite).__enter__()
    assert (tmp_path / "run").read_text() == "precious"


def test_overwriting_replaces_the_whole_folder(tmp_path):
    make(tmp_path / "run")
    (tmp_path / "run" / "stale").write_text("x")
    with begin(tmp_path / "run", overwrite=True) as part:
        (part / "result").write_text("new")
        assert (tmp_path / "run" / "result").read_text() == "old"
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["result"]
    assert (tmp_path / "run" / "result").read_text() == "new"


@pytest.mark.parametrize("what", ["a link", "a broken link", "a fifo", "a socket", "a device"])
def test_only_folders_are_replaced(tmp_path, what):
    run = tmp_path / "run"
    if what == "a fifo":
        os.mkfifo(run)
    elif what == "a device":
        try:
            os.mknod(run, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # a null device of our own
        except PermissionError:
            pytest.skip("only root makes device nodes")
    elif what == "a socket":
        with socket.socket(socket.AF_UNIX) as place:
            place.bind(str(run))
    else:
        run.symlink_to(tmp_path / "real")
        if what == "a link":
            make(tmp_path / "real")
    before = run.lstat()
    with pytest.raises(OutputError, match="expected a folder or nothing"):
        begin(run, overwrite=True).__enter__()
    assert os.path.samestat(run.lstat(), before)
    assert names(tmp_path) == (["real", "run"] if what == "a link" else ["run"])


def test_a_folder_without_our_manifest_is_never_replaced(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for text in (None, "{}", "[1]", '{"format": "theirs"}', "[" * 20_000):
        if text is not None:
            (run / "manifest.json").write_text(text)
        with pytest.raises(OutputError, match="no manifest") as raised:
            begin(run, overwrite=True).__enter__()
        assert "\n" not in str(raised.value)
    (run / "manifest.json").unlink()
    assert list(tmp_path.iterdir()) == [run] and run.is_dir()


@pytest.mark.parametrize("place", ["run", "run/docs.jsonl", ".", "link"])
def test_nothing_that_is_read_is_replaced(tmp_path, place):
    run = tmp_path / "run"
    make(run)
    (tmp_path / "link").symlink_to(run / "docs.jsonl")
    (run / "docs.jsonl").write_text("x")
    words = {"run": "it is", ".": "it is inside"}.get(place, "it contains")
    with pytest.raises(OutputError, match=f"{words} .*, which the run reads"):
        begin(run, overwrite=True, inputs=[tmp_path / place]).__enter__()
    with begin(run, overwrite=True, inputs=[tmp_path / "runs"]):
        pass


@pytest.mark.parametrize("below", [".", "deep/er"])
@pytest.mark.parametrize("ground", ["working", "home"])
def test_the_ground_that_a_run_stands_on_is_not_replaced(tmp_path, monkeypatch, ground, below):
    run = tmp_path / "run"
    make(run)
    (run / below).mkdir(parents=True, exist_ok=True)
    if ground == "home":
        monkeypatch.setenv("HOME", str(run / below))
    else:
        monkeypatch.chdir(run / below)
    with pytest.raises(OutputError, match=f"the {ground} directory"):
        begin(run if ground == "home" else os.path.relpath(run), overwrite=True).__enter__()


@pytest.mark.parametrize("stop", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()])
def test_a_failed_rename_restores_the_old_result(tmp_path, monkeypatch, stop):
    make(tmp_path / "run")
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".part"):
            raise stop
        rename(source, target)

    monkeypatch.setattr(rundir.os, "rename", refuse)
    expected = OutputError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        with begin(tmp_path / "run", overwrite=True) as part:
            (part / "result").write_text("new")
    assert (tmp_path / "run" / "result").read_text() == "old"
    # A complete result that only lacks its name is kept, and the message says where.
    assert names(tmp_path) == (["run", "run.part"] if expected is OutputError else ["run"])


def test_a_folder_that_appears_meanwhile_is_neither_replaced_nor_nested_into(tmp_path):
    with pytest.raises(OutputError, match=r"exists already.*finished result is in .*run\.part"):
        with begin(tmp_path / "run") as part:
            (part / "result").write_text("new")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "result").write_text("somebody else's")
    assert names(tmp_path / "run") == ["result"]
    assert (tmp_path / "run" / "result").read_text() == "somebody else's"
    assert (tmp_path / "run.part" / "result").read_text() == "new"


HELD = """
import os, sys, time
from jhessians.interop.rundir import RunDirectory
with RunDirectory(sys.argv[1], command="compute") as part:
    (part / "shard").write_text("x")
    print("here", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process, in the middle of a run."""
    with subprocess.Popen(
        [sys.executable, "-c", HELD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


def test_one_run_at_a_time(tmp_path, other):
    with pytest.raises(OutputError, match=f"written by process {other.pid} on .*, since 2"):
        begin(tmp_path / "run").__enter__()
    assert (tmp_path / "run.part" / "shard").exists()
    other.kill()
    other.wait()
    with begin(tmp_path / "run") as part:  # what it left is ours to remove
        assert names(part) == []
    assert names(tmp_path) == ["run"]


def test_a_holder_elsewhere_is_alive_while_its_file_is_touched(tmp_path, other):
    other.kill()
    other.wait()
    mark = tmp_path / "run.part" / ".run.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"host": "another"}))
    with pytest.raises(OutputError, match="is being written by process .* on another"):
        begin(tmp_path / "run").__enter__()
    long_ago = mark.stat().st_mtime - hold.EXPIRED - 1
    os.utime(mark, (long_ago, long_ago))
    with begin(tmp_path / "run"):
        pass


def test_without_locks_a_file_that_is_touched_is_held(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(hold.fcntl, "flock", unsupported)
    monkeypatch.setattr(hold, "HEARTBEAT", 0.02)
    with begin(tmp_path / "run") as part:
        mark = part / ".run.json"
        os.utime(mark, (0, 0))
        deadline = time.monotonic() + 10
        while mark.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(OutputError, match="is being written by"):
            begin(tmp_path / "run").__enter__()


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_we_did_not_leave_is_not_removed(tmp_path, what):
    part = tmp_path / "run.part"
    if what == "file":
        part.write_text("precious")
    else:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "result").write_text("precious")
        if what == "folder":
            (tmp_path / "real").rename(part)
        else:
            part.symlink_to(tmp_path / "real")
    before = names(tmp_path)
    with pytest.raises(OutputError, match="isn't what an unfinished run left there"):
        begin(tmp_path / "run").__enter__()
    assert names(tmp_path) == before
    precious = part if what == "file" else part / "result"
    assert precious.read_text() == "precious"


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="a part of the path is a file") as raised:
        begin(tmp_path / "file" / "run").__enter__()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "the disk is full"),
    ],
)
def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, number, words):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=words):
        begin(tmp_path / "run").__enter__()


def test_a_disk_that_fills_up_during_the_run(tmp_path):
    make(tmp_path / "run")
    with pytest.raises(OutputError, match=r"run: the disk is full; free some space"):
        with begin(tmp_path / "run", overwrite=True):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "result").read_text() == "old"


def test_a_disk_that_fills_up_after_something_was_saved(tmp_path):
    with pytest.raises(OutputError, match="the disk is full") as raised:
        with begin(tmp_path / "run") as part:
            (part / STATE / "covariances" / "1").mkdir(parents=True)
            raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.__notes__ == [how_to_go_on(part)]


def test_trouble_with_somebody_elses_file_keeps_its_own_error(tmp_path):
    for error in (PermissionError(errno.EACCES, "no", "/data/docs.jsonl"), FileNotFoundError()):
        with pytest.raises(type(error)):
            with begin(tmp_path / "run"):
                raise error
    with pytest.raises(OutputError, match="permission denied"):
        with begin(tmp_path / "run") as part:
            raise PermissionError(errno.EACCES, "no", str(part / "shard"))


def test_a_process_that_does_not_write_touches_nothing(tmp_path):
    make(tmp_path / "run")
    with begin(tmp_path / "run", writer=False) as part:
        assert part == tmp_path / "run.part"
    assert names(tmp_path) == ["run"]


def test_the_root_is_no_run_directory():
    with pytest.raises(OutputError, match="give a new folder"):
        begin("/")
