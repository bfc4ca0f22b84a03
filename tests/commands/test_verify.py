"""`jhessians verify`: a result is whole, or the damaged file is named."""

import pytest

from jhessians.cli.main import main
from jhessians.interop.rundir import RunDirectory


@pytest.fixture
def result(tmp_path):
    with RunDirectory(tmp_path / "run", command="compute") as part:
        (part / "factors").mkdir()
        for number in range(7):
            (part / "factors" / f"shard_{number}").write_bytes(bytes([number]) * 100)
    return tmp_path / "run"


def error(capsys, *words):
    assert main(["verify", *map(str, words)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("deep", [[], ["--deep"]])
def test_a_whole_result(result, deep, capsys):
    assert main(["verify", str(result), *deep]) == 0
    said = capsys.readouterr().out
    assert f"{result}: 7 files of compute, 700 bytes, all there" in said
    assert ("SHA-256" in said) == bool(deep)


def test_the_damaged_file_is_named(result, capsys):
    (result / "factors" / "shard_3").write_bytes(bytes(100))
    assert main(["verify", str(result)]) == 0  # its size is right
    capsys.readouterr()
    assert "factors/shard_3 has changed" in error(capsys, result, "--deep")
    (result / "factors" / "shard_3").unlink()
    assert "factors/shard_3 is missing;" in error(capsys, result)
    for number in (0, 1, 2, 4, 5, 6):
        (result / "factors" / f"shard_{number}").unlink()
    assert "; and 2 more; get a whole copy" in error(capsys, result)


def test_what_is_no_result(tmp_path, capsys):
    assert "has no manifest.json" in error(capsys, tmp_path)
    assert "is no folder" in error(capsys, tmp_path / "nowhere")
    assert main(["verify"]) == 2
    assert "RUN is missing" in capsys.readouterr().err
