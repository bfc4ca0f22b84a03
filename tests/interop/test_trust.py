"""A result is read as it was written, or not at all: files mixed, missing, damaged, or no files."""

import json
import os
import shutil
import socket

import numpy as np
import pytest
from bergson.hessians.preconditioner import _load_full

from converters.hub import find
from converters.reader import open_checkpoint
from jhessians.cli.main import main
from jhessians.errors import CheckpointError, NumericsError, UserError
from jhessians.influence.factors import load_factors
from jhessians.interop import torchfile
from jhessians.interop.layout import KINDS, RUN_ID
from jhessians.interop.load import FactorStore
from jhessians.interop.manifest import MANIFEST, read_manifest
from jhessians.interop.rundir import RunDirectory
from jhessians.interop.safetensors_file import open_described
from tests.interop.readers import READERS, SMALL, finish, read_factors, write_factors
from tests.interop.synthetic import make_factors

FOLDER = "eigen_activation_sharded"


def run(folder, layout="both"):
    """A finished run of two shards."""
    with RunDirectory(folder, command="compute") as part:
        write_factors(part, layout=layout)
    return folder


def refused(folder, words, kind=CheckpointError):
    with pytest.raises(kind, match=words) as raised:
        read_factors(folder)
    assert str(raised.value).isprintable()


def test_every_shard_names_its_run_and_bergson_reads_it(tmp_path):
    folder = run(tmp_path / "run")
    shards = list(folder.rglob("shard_*.safetensors"))
    assert len(shards) == 2 * (len(KINDS) + 5)
    run_id = read_manifest(folder).run_id
    assert {open_described(path)[1][RUN_ID] for path in shards} == {run_id}
    read_factors(folder)
    factors = make_factors(sizes=SMALL)
    for kind, entry in KINDS.items():
        if not entry.replicated:
            for module, value in _load_full(folder, entry.folder, "cpu").items():
                np.testing.assert_array_equal(value.numpy(), factors[kind][module])


def test_shards_of_two_runs_are_never_mixed(tmp_path):
    """The same numbers, to the byte, but for the run."""
    mine, other = run(tmp_path / "mine"), run(tmp_path / "other")
    shutil.copy(other / FOLDER / "shard_1.safetensors", mine / FOLDER)
    refused(mine, "eigen_activation_sharded/shard_1.safetensors is of run .*, but the manifest is")
    (mine / MANIFEST).unlink()
    refused(mine, "shard_1.safetensors is of run .*, but shard_0.safetensors is of run")
    shutil.copy(other / FOLDER / "shard_0.safetensors", mine / FOLDER)
    refused(mine, "expected the files of one run")


def test_a_shard_that_names_no_run_is_none_of_ours(tmp_path):
    folder = run(tmp_path / "run")
    write_factors(tmp_path / "plain", layout="bergson")
    read_factors(tmp_path / "plain")
    # The header is shorter by the run's name, which is filled up to the same size.
    for path in (folder / FOLDER).iterdir():
        data = (tmp_path / "plain" / FOLDER / path.name).read_bytes()
        longer = path.stat().st_size - len(data)
        length = int.from_bytes(data[:8], "little")
        path.write_bytes(
            (length + longer).to_bytes(8, "little") + data[8 : 8 + length] + b" " * longer
            + data[8 + length :]
        )  # fmt: skip
    refused(folder, "shard_0.safetensors is of no known run, but the manifest is of run")


def test_whatever_is_missing_is_named(tmp_path):
    def case(name, words, *patterns, layout="both"):
        folder = run(tmp_path / name, layout)
        for pattern in patterns:
            for path in list(folder.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        refused(folder, words)

    case("one", f"{FOLDER}/shard_1.safetensors is missing", f"{FOLDER}/shard_1*")
    case("last of all", "shard_1.safetensors is missing", "**/shard_1*")
    case("a kind", "eigenvalue_correction_sharded/shard_0.* is missing", "eigenvalue_correction_s*")
    case("a tree", "wrote: activation_sharded/shard_0.* is missing", "*sharded", "factor_*")
    case("count", "total_processed.pt is missing", "total_processed.pt")
    case("older", "influence_results/.*shard_0.* is missing", "influence_results/*/shard_0*",
         layout="influence_results")  # fmt: skip


def test_what_a_run_has_written_so_far_is_no_result(tmp_path):
    with RunDirectory(tmp_path / "run", command="compute") as part:
        write_factors(part)
        refused(part, "run.part is what an unfinished run has written so far")
    read_factors(tmp_path / "run")


def test_the_older_tree_alone_is_compared_with_the_manifest_beside_it(tmp_path):
    folder = run(tmp_path / "run")
    read_factors(folder / "influence_results")
    next((folder / "influence_results").glob("*/shard_1*")).unlink()
    refused(folder / "influence_results", "is not what compute wrote: influence_results/")
    read_factors(folder)


def test_damaged_bytes_are_found(tmp_path, capsys):
    """In a header by the reader, in numbers by `verify --deep`."""
    folder = run(tmp_path / "run")
    path = folder / FOLDER / "shard_1.safetensors"
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    caught = 0
    for at in range(start):
        for value in (0, good[at] ^ 1):
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            try:
                read_factors(folder)
            except UserError as error:
                assert FOLDER in str(error) and str(error).isprintable()
                caught += 1
            else:  # what stays a space is no damage
                assert open_described(path)[0].keys() == SMALL.keys()
    assert caught > 1.9 * start
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    read_factors(folder)
    assert main(["verify", str(folder)]) == 0
    assert main(["verify", str(folder), "--deep"]) == 1
    assert f"{FOLDER}/shard_1.safetensors has changed" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(tmp_path, value):
    folder = run(tmp_path / "run")
    path = folder / FOLDER / "shard_1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + np.float32(value).tobytes())
    with pytest.raises(NumericsError, match="shard_1.safetensors: h.0.down holds NaN or infinity"):
        load_factors(folder)


def test_shards_of_two_number_formats(tmp_path):
    for name, dtype in (("mine", "fp32"), ("other", "bf16")):
        write_factors(tmp_path / name, layout="bergson", dtype=dtype)
    shutil.copy(tmp_path / "other" / FOLDER / "shard_1.safetensors", tmp_path / "mine" / FOLDER)
    refused(tmp_path / "mine", "is stored in bfloat16, in shard 0 in float32")


COUNTS = [{"total": 5}, None, -5, 0, np.float64("nan"), 2.5, True, "5", [5], np.arange(2),
          np.array(-5), 10**40]  # fmt: skip


@pytest.mark.parametrize("value", COUNTS, ids=map(repr, range(len(COUNTS))))
def test_what_is_no_count_of_positions(tmp_path, value):
    write_factors(tmp_path, layout="bergson")
    for good in (np.array(7), 7):
        torchfile.save(good, tmp_path / "total_processed.pt")
        assert FactorStore(tmp_path).total_processed == 7
    torchfile.save(value, tmp_path / "total_processed.pt")
    refused(tmp_path, "total_processed.pt holds .*; expected a count of at least 1")


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", READERS)
def test_every_file_has_the_size_of_the_manifest(tmp_path, name):
    """One that is empty, or gone, is named by every reader."""
    reader = READERS[name]
    finish(reader, tmp_path / "run")
    reader.read(tmp_path / "run")
    if "model" in name or name == "optimizer":
        return  # what others wrote has no manifest
    for path in files_of(tmp_path / "run"):
        if path.name in (MANIFEST, "config.json", "normalizers.pth", "processor_config.json",
                         "preconditioners.pth", "total_processed_lambda.pt"):  # fmt: skip
            continue
        content = path.read_bytes()
        for longer in (True, False):
            path.write_bytes(content + b" ") if longer else path.unlink()
            with pytest.raises(UserError, match=path.name) as raised:
                reader.read(tmp_path / "run")
            assert "not what test wrote" in str(raised.value)
        path.write_bytes(content)


KINDS_OF_NODE = {
    "a named pipe": os.mkfifo,
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
    "a device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", KINDS_OF_NODE)
@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_what_is_no_file(tmp_path, monkeypatch, name, what):
    """In place of any file, with a manifest and without."""
    monkeypatch.chdir(tmp_path)
    reader = READERS[name]
    folder = tmp_path / "run"
    if name == "any result":
        finish(reader, folder)
    else:
        folder.mkdir()
        reader.write(folder)
    said = []
    for path in files_of(folder):
        content = path.read_bytes()
        path.unlink()
        KINDS_OF_NODE[what](path)
        try:
            reader.read(folder)
        except UserError as error:
            said.append(str(error))
            assert f"it is {what}" in str(error) and str(error).isprintable(), error
        path.unlink()
        path.write_bytes(content)
    assert said


@pytest.mark.parametrize("name", ["x" * 300, "two\nlines", "a\0b"])
def test_an_index_may_name_what_can_be_no_file(tmp_path, name):
    READERS["sharded model"].write(tmp_path)
    index = {"weight_map": {"wte.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (find(tmp_path).obtain_weights, lambda: open_checkpoint(tmp_path)):
        try:
            read()
        except CheckpointError as error:
            assert "is half downloaded" in str(error) and str(error).isprintable()
    with pytest.raises(CheckpointError, match="is half downloaded"):
        open_checkpoint(tmp_path)
