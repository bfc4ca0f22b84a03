"""Input files: opened in one place, and nothing else than an ordinary file is."""

import os
import re
import threading
from pathlib import Path

import pytest

import converters
import jhessians
from jhessians.files import open_input, parse_json, read_text, read_yaml, require_ordinary_files

OPENERS = re.compile(
    r"\.read_text\(|\.read_bytes\(|\.open\(\"r|\bopen\([^)]*\"rb?\"|\.open\(\)"
    r"|json\.loads?\(|safe_load|\bnp\.load\(|\bnp\.fromfile\("
)
ELSEWHERE = {
    "files.py": "the one place",
    "hold.py": "the mark of a run, which only our runs write",
    "memory.py": "the kernel's own files",
    "place.py": "the kernel's own files",
    "recorder.py": "the kernel's own files",
    "work.py": "the demo's own data",
    "companions.py": "what transformers has just written into a temporary folder",
}


def test_nothing_else_opens_input_files():
    roots = [Path(str(package.__file__)).parent for package in (jhessians, converters)]
    found = {
        f"{path.name}: {line.strip()}"
        for root in roots
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if OPENERS.search(line) and path.name not in ELSEWHERE
    }
    assert not found, "use jhessians/files.py, which refuses what would never end"


def test_the_scan_sees_what_opens():
    for line in ('path.read_text()', 'open(path, "rb")', 'path.open("rb")', "json.load(file)",
                 "yaml.safe_load(text)", "np.load(path)", "path.open()"):  # fmt: skip
        assert OPENERS.search(line), line
    for line in ('path.open("xb")', 'open(path, "w")', "read_text(path)", "os.open(path)"):
        assert not OPENERS.search(line), line


@pytest.mark.timeout(20)
def test_a_pipe_that_takes_the_place_of_a_file_is_refused(tmp_path, monkeypatch):
    """Between looking at the path and opening it: the open file is looked at as well."""
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_text("x")
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path: real(file if path == pipe else path))
    with pytest.raises(OSError, match="it is a named pipe; expected an ordinary file"):
        open_input(pipe)


@pytest.mark.timeout(20)
def test_what_a_writer_waits_with_is_not_consumed(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("words"), daemon=True)
    writer.start()
    with pytest.raises(OSError, match="named pipe"):
        read_text(pipe)
    assert pipe.read_text() == "words"


def test_folders_and_links(tmp_path):
    (tmp_path / "file").write_text("words")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    require_ordinary_files(tmp_path)
    assert read_text(tmp_path / "link") == "words"
    with pytest.raises(IsADirectoryError):
        open_input(tmp_path)
    (tmp_path / "inside").mkdir()
    os.mkfifo(tmp_path / "inside" / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        require_ordinary_files(tmp_path)


def test_what_is_no_json_or_yaml_is_a_value_error(tmp_path):
    for text in ("[" * 20_000, '{"a":' * 20_000, "9" * 5000, b"\xff", "{", ""):
        with pytest.raises(ValueError):
            parse_json(text)
    for text in ("[" * 20_000, "- " * 20_000, "!!int ''", "!!timestamp x", "a: b: c", "\0",
                 "2024-99-99", "!!python/object/apply:os.system [exit]", "&a [*b]"):  # fmt: skip
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError) as raised:
            read_yaml(tmp_path / "x.yaml")
        assert "\n" not in str(raised.value)
    (tmp_path / "x.yaml").write_text("a: [1, {b: 2}]")
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, {"b": 2}]}
