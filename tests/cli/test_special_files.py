"""A named pipe or a device in place of any input: the command says so at once, in one line."""

import os
import shutil
from pathlib import Path

import pytest

from converters.hub import load_tokenizer
from jhessians.cli.main import main
from tests.cli.work import Work, the_line


def in_place_of(path: Path) -> None:
    if path.exists():
        path.unlink()
    os.mkfifo(path)


def folder_of_data(work: Work) -> Path:
    folder = work.folder / "data"
    folder.mkdir()
    shutil.move(work.data, folder)
    work.flags += [f"--dataset={folder}"]
    return folder / "more.jsonl"


def saved_data(work: Work) -> Path:
    import datasets

    folder = work.folder / "saved"
    datasets.Dataset.from_list([{"text": "some words"}]).save_to_disk(str(folder))
    work.flags += [f"--dataset={folder}"]
    return folder / "state.json"


def pattern_of_data(work: Work) -> Path:
    work.flags += [f"--dataset={work.folder}/*.jsonl"]
    return work.folder / "docs2.jsonl"


def data_of_no_format(work: Work) -> Path:
    work.flags += [f"--dataset={work.folder}/docs.doc"]
    return work.folder / "docs.doc"


def optimizer(work: Work) -> Path:
    work.flags += [f"--optimizer_state={work.folder}/optimizer.pt", "--method=autocorrelation"]
    return work.folder / "optimizer.pt"


def orbax(work: Work) -> Path:
    folder = work.folder / "state"
    folder.mkdir()
    (folder / "_METADATA").write_text("{}")
    work.flags += [f"--optimizer_state={folder}", "--method=autocorrelation"]
    return folder / "manifest.ocdbt"


def options(work: Work) -> Path:
    work.flags += [f"--config={work.folder}/options.yaml"]
    return work.folder / "options.yaml"


PLACES = {
    "data": lambda work: work.data,
    "folder of data": folder_of_data,
    "saved data": saved_data,
    "pattern of data": pattern_of_data,
    "data of no format": data_of_no_format,
    "config.json": lambda work: work.model / "config.json",
    "weights": lambda work: work.model / "model.safetensors",
    "tokenizer": lambda work: work.model / "tokenizer.json",
    "another tokenizer": lambda work: work.model / "vocab.txt",
    "adapter": lambda work: work.model / "adapter_config.json",
    "optimizer": optimizer,
    "orbax": orbax,
    "options": options,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", PLACES)
def test_a_pipe_is_refused_at_once(work, capfd, place):
    in_place_of(PLACES[place](work))
    capfd.readouterr()
    assert main([*work.arguments(), "--quiet"]) in (1, 2)
    assert "it is a named pipe; expected an ordinary file" in the_line(capfd.readouterr().err)
    assert work.left_behind() == []


@pytest.mark.timeout(60)
def test_a_device_is_refused_at_once(work, capfd):
    """As a link, which is how the Hub keeps its files."""
    work.data.unlink()
    work.data.symlink_to("/dev/zero")
    assert main([*work.arguments(), "--quiet"]) == 1
    assert "it is a device; expected an ordinary file" in the_line(capfd.readouterr().err)


def test_a_pipe_that_nobody_reads_does_no_harm(work):
    """Not every folder is a model's alone."""
    in_place_of(work.model / "control")
    assert load_tokenizer(work.model) is not None
