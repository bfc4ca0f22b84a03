"""A result appears whole or not at all, and what was there before is never lost."""

import errno
import os
from pathlib import Path

import pytest

from jhessians.errors import OutputError
from jhessians.interop import rundir
from jhessians.interop.rundir import RunDirectory


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(folder, text="old"):
    folder.mkdir(parents=True)
    (folder / "result").write_text(text)


def test_a_finished_run_gets_its_name(tmp_path):
    with RunDirectory(tmp_path / "a" / "run") as part:
        assert part == tmp_path / "a" / "run.part"
        (part / "result").write_text("new")
        assert not (tmp_path / "a" / "run").exists()
    assert names(tmp_path / "a") == ["run"]
    assert (tmp_path / "a" / "run" / "result").read_text() == "new"


def test_a_relative_path_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with RunDirectory("run/"):
        os.chdir("elsewhere")
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("stop", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_leaves_nothing_new(tmp_path, stop, overwrite):
    run = tmp_path / "run"
    if overwrite:
        make(run)
    with pytest.raises(type(stop)) as raised:
        with RunDirectory(run, overwrite) as part:
            (part / "result").write_text("new")
            raise stop
    assert raised.value is stop
    assert names(tmp_path) == (["run"] if overwrite else [])
    assert not overwrite or (run / "result").read_text() == "old"


def test_an_existing_path_is_refused_before_any_work(tmp_path):
    make(tmp_path / "run")
    with pytest.raises(OutputError, match="exists already.*`overwrite`") as raised:
        RunDirectory(tmp_path / "run").__enter__()
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(OutputError, match="is a file"):
        RunDirectory(tmp_path / "run", overwrite).__enter__()
    assert (tmp_path / "run").read_text() == "precious"


def test_overwriting_replaces_the_whole_folder(tmp_path):
    make(tmp_path / "run")
    (tmp_path / "run" / "stale").write_text("x")
    with RunDirectory(tmp_path / "run", overwrite=True) as part:
        (part / "result").write_text("new")
        assert (tmp_path / "run" / "result").read_text() == "old"
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["result"]
    assert (tmp_path / "run" / "result").read_text() == "new"


def test_overwriting_a_link_replaces_the_link_not_its_target(tmp_path):
    make(tmp_path / "real")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with RunDirectory(tmp_path / "run", overwrite=True) as part:
        (part / "result").write_text("new")
    assert (tmp_path / "real" / "result").read_text() == "old"
    assert (tmp_path / "run" / "result").read_text() == "new"
    assert names(tmp_path) == ["real", "run"]


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
        with RunDirectory(tmp_path / "run", overwrite=True) as part:
            (part / "result").write_text("new")
    assert (tmp_path / "run" / "result").read_text() == "old"
    # A complete result that only lacks its name is kept, and the message says where.
    assert names(tmp_path) == (["run", "run.part"] if expected is OutputError else ["run"])


def test_a_folder_that_appears_meanwhile_is_neither_replaced_nor_nested_into(tmp_path):
    with pytest.raises(OutputError, match=r"exists already.*finished result is in .*run\.part"):
        with RunDirectory(tmp_path / "run") as part:
            (part / "result").write_text("new")
            make(tmp_path / "run", "somebody else's")
    assert names(tmp_path / "run") == ["result"]
    assert (tmp_path / "run" / "result").read_text() == "somebody else's"
    assert (tmp_path / "run.part" / "result").read_text() == "new"


@pytest.mark.parametrize("stale", ["folder", "file"])
def test_a_leftover_of_a_killed_run_is_removed(tmp_path, stale):
    if stale == "folder":
        make(tmp_path / "run.part")
    else:
        (tmp_path / "run.part").write_text("x")
    with RunDirectory(tmp_path / "run") as part:
        assert names(part) == []
    assert names(tmp_path) == ["run"]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="a part of the path is a file") as raised:
        RunDirectory(tmp_path / "file" / "run").__enter__()
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
        RunDirectory(tmp_path / "run").__enter__()


def test_a_disk_that_fills_up_during_the_run(tmp_path):
    make(tmp_path / "run")
    with pytest.raises(OutputError, match=r"run: the disk is full; free some space"):
        with RunDirectory(tmp_path / "run", overwrite=True):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "result").read_text() == "old"


def test_trouble_with_somebody_elses_file_keeps_its_own_error(tmp_path):
    for error in (PermissionError(errno.EACCES, "no", "/data/docs.jsonl"), FileNotFoundError()):
        with pytest.raises(type(error)):
            with RunDirectory(tmp_path / "run"):
                raise error
    with pytest.raises(OutputError, match="permission denied"):
        with RunDirectory(tmp_path / "run") as part:
            raise PermissionError(errno.EACCES, "no", str(part / "shard"))


def test_a_process_that_does_not_write_touches_nothing(tmp_path):
    make(tmp_path / "run")
    with RunDirectory(tmp_path / "run", writer=False) as part:
        assert part == tmp_path / "run.part"
    assert names(tmp_path) == ["run"]


def test_the_root_is_no_run_directory():
    with pytest.raises(OutputError, match="give a new folder"):
        RunDirectory("/")
