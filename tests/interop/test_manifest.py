"""A finished result says what it consists of, and what has changed since is found."""

import hashlib
import json

import pytest

from jhessians.errors import CheckpointError
from jhessians.interop.manifest import MANIFEST, problems, read_manifest, write_manifest


@pytest.fixture
def result(tmp_path):
    folder = tmp_path / "run"
    (folder / "factors").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "factors" / "shard_0.safetensors").write_bytes(bytes(range(256)) * 40)
    write_manifest(folder, run_id="6d0c", command="compute")
    return folder


def test_it_names_every_file_with_size_and_hash(result):
    document = json.loads((result / MANIFEST).read_text())
    assert document["run_id"] == "6d0c" and document["command"] == "compute"
    assert sorted(document["files"]) == ["config.yaml", "factors/shard_0.safetensors"]
    shard = result / "factors" / "shard_0.safetensors"
    expected = {"size": 10240, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
    assert document["files"]["factors/shard_0.safetensors"] == expected
    assert list(problems(result, read_manifest(result), deep=True)) == []


def test_what_changed_is_found(result):
    manifest = read_manifest(result)
    shard = result / "factors" / "shard_0.safetensors"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    assert list(problems(result, manifest, deep=False)) == []
    (line,) = problems(result, manifest, deep=True)
    assert line.startswith("factors/shard_0.safetensors has changed")
    shard.write_bytes(data[:-1])
    (line,) = problems(result, manifest, deep=False)
    assert line == "factors/shard_0.safetensors has 10,239 bytes; expected 10,240"
    shard.rename(shard.with_name("shard_1.safetensors"))
    assert list(problems(result, manifest, deep=False)) == [
        "factors/shard_0.safetensors is missing",
        "factors/shard_1.safetensors isn't part of the result",
    ]


def test_of_other_programs_there_is_none(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "jhessians", "version": 2, "files": {}}', "[" * 100_000,
     '{"format": "jhessians", "version": 1, "run_id": "a", "command": "b", "files": {"x": 1}}'],
)  # fmt: skip
def test_a_damaged_one_is_an_error_in_one_line(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="is no manifest of jhessians") as raised:
        read_manifest(tmp_path)
    assert "\n" not in str(raised.value)
