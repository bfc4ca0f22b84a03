"""Bad input through the real command: one line, an exit code, and nothing half done left behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from jhessians.cli.main import main
from jhessians.cli.signals import Terminated, unwound_by_signals
from jhessians.interop import shards, torchfile
from jhessians.interop.rundir import RunDirectory
from tests.cli.work import FIRST_LINEAR, KERNEL, Work, the_line


def unknown_model_type(work):
    work.settings(model_type="mystery", architectures=["MysteryForCausalLM"])


def no_config(work):
    (work.model / "config.json").unlink()


def no_model(work):
    shutil.rmtree(work.model)


def no_weights(work):
    (work.model / "model.safetensors").unlink()


def tensor_missing(work):
    work.weights(lambda tensors: tensors.pop(KERNEL))


def tensor_extra(work):
    work.weights(lambda tensors: tensors.update({"transformer.h.0.extra": np.ones(3, "f4")}))


def tensor_misshapen(work):
    work.weights(lambda tensors: tensors.update({KERNEL: tensors[KERNEL][:, :-1].copy()}))


def checkpoint_truncated(work):
    path = work.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def bin_truncated(work):
    tensors = load_file(work.model / "model.safetensors")
    no_weights(work)
    torchfile.save(tensors, work.model / "pytorch_model.bin")
    path = work.model / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])


def nan_in_weights(work):
    work.weights(lambda tensors: tensors[KERNEL].__setitem__((1, 2), np.nan))


def weights_beyond_precision(work):
    work.weights(lambda tensors: tensors[KERNEL].__setitem__((1, 2), 1e6))
    work.flags += ["--precision=fp16"]


def no_tokenizer(work):
    for path in (work.model / "tokenizer.json", work.model / "tokenizer_config.json"):
        path.unlink()


def no_dataset(work):
    work.data.unlink()


def dataset_empty(work):
    work.data.write_text("")


def dataset_without_rows(work):
    work.data.unlink()
    (work.folder / "docs.csv").write_text("text\n")
    work.flags += [f"--dataset={work.folder / 'docs.csv'}"]


def dataset_not_json(work):
    work.data.write_text('{"text": "fine"}\n{"text": \n')


def dataset_of_unknown_format(work):
    (work.folder / "docs.doc").write_text("text")
    work.flags += [f"--dataset={work.folder / 'docs.doc'}"]


def column_missing(work):
    work.write({"texts": "some words to learn from"})


def column_not_text(work):
    work.write({"text": "some words to learn from"}, {"text": None})


def completion_column_missing(work):
    work.flags += ["--completion_column=answer"]


def split_missing(work):
    work.flags += ["--split=test"]


def documents_too_short(work):
    work.write({"text": "a"}, {"text": "b"}, {"text": ""})


def document_beyond_the_model(work):
    work.write({"text": "some words"}, {"text": "many words " * 100})


def document_beyond_the_budget(work):
    work.flags += ["--token_batch_size=16"]


def chunk_beyond_the_model(work):
    work.flags += ["--chunk_length=129"]


def token_outside_the_vocabulary(work):
    work.write({"input_ids": [5, 6, 7]}, {"input_ids": [5, 999, 7]})


def label_outside_the_vocabulary(work):
    work.write({"input_ids": [5, 6, 7], "labels": [-100, 999, 7]})


def tokenizer_of_another_model(work):
    """One that knows more tokens than the model."""
    work.weights(lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"][:99]}))
    work.settings(vocab_size=99)


def nothing_to_predict(work):
    work.write({"input_ids": [5, 6, 7], "labels": [-100, -100, -100]})


def run_path_under_a_file(work):
    work.run.parent.write_text("a file")


def too_many_devices(work):
    work.flags += ["--world_size=9"]


def no_such_module(work):
    work.flags += ["--modules", "h.*.attn.q_proj"]


def no_such_module_to_leave_out(work):
    work.flags += ["--filter_modules=*.q_proj"]


def all_modules_left_out(work):
    work.flags += ["--filter_modules=*"]


def unknown_option(work):
    work.flags += ["--token_batch_sise=8"]


# What is wrong, the exit code, words of the message: what was given and what to do about it.
CASES = [
    (unknown_model_type, 1, ["mystery", "gpt2, gpt_neo, gpt_neox"]),
    (no_config, 1, ["config.json"]),
    (no_model, 1, ["model", "isn't a folder"]),
    (no_weights, 1, ["has no weights", "model.safetensors"]),
    (tensor_missing, 1, ["missing", KERNEL]),
    (tensor_extra, 1, ["unexpected", "transformer.h.0.extra"]),
    (tensor_misshapen, 1, ["misshapen", KERNEL, "[24, 71]", "[24, 72]"]),
    (checkpoint_truncated, 1, ["truncated", "model.safetensors", "get a whole copy"]),
    (bin_truncated, 1, ["pytorch_model.bin"]),
    (nan_in_weights, 1, [KERNEL]),
    (weights_beyond_precision, 1, [KERNEL, "float16"]),
    (no_tokenizer, 1, ["has no tokenizer", "--tokenizer"]),
    (no_dataset, 1, ["docs.jsonl"]),
    (dataset_empty, 1, ["docs.jsonl", "is empty"]),
    (dataset_without_rows, 1, ["docs.csv", "no rows"]),
    (dataset_not_json, 1, ["docs.jsonl", "can't be read"]),
    (dataset_of_unknown_format, 1, [".doc", ".jsonl"]),
    (column_missing, 1, ["no column 'text'", "--prompt_column texts"]),
    (column_not_text, 1, ["row 1", "null"]),
    (completion_column_missing, 1, ["no column 'answer'", "--completion_column"]),
    (split_missing, 1, ["split 'test'"]),
    (documents_too_short, 1, ["3 documents", "fewer than 2 tokens"]),
    (document_beyond_the_model, 1, ["row 1", "128", "--truncation"]),
    (document_beyond_the_budget, 1, ["row 0", "20 tokens", "16", "--token_batch_size"]),
    (chunk_beyond_the_model, 2, ["--chunk_length 129", "128"]),
    (token_outside_the_vocabulary, 1, ["row 1", "999", "320"]),
    (label_outside_the_vocabulary, 1, ["row 0", "label 999", "320"]),
    (tokenizer_of_another_model, 1, ["row 0", "vocabulary of 99"]),
    (nothing_to_predict, 1, ["label"]),
    (run_path_under_a_file, 1, ["a part of the path is a file"]),
    (too_many_devices, 1, ["--world_size", "9 devices", "8"]),
    (no_such_module, 2, ["'h.*.attn.q_proj'", "none of 4", "h.0.attn.c_proj"]),
    (no_such_module_to_leave_out, 2, ["'*.q_proj'"]),
    (all_modules_left_out, 2, ["leave none of 4 modules"]),
    (unknown_option, 2, ["--token_batch_size"]),
]


@pytest.mark.parametrize(("spoil", "code", "words"), CASES, ids=[c[0].__name__ for c in CASES])
def test_one_line_and_nothing_left(work, capfd, spoil, code, words):
    spoil(work)
    assert main([*work.arguments(), "--quiet"]) == code
    output = capfd.readouterr()
    assert output.out == ""
    line = the_line(output.err)
    for word in words:
        assert word in line
    if work.run.parent.is_dir():
        assert work.left_behind() == []


@pytest.mark.parametrize("spoil", [unknown_model_type, documents_too_short, no_such_module])
def test_the_error_is_the_last_line_of_a_talkative_run(work, capfd, spoil):
    spoil(work)
    assert main(work.arguments())
    lines = capfd.readouterr().err.splitlines()
    the_line(lines[-1])
    assert not any("error" in line.lower() or "Traceback" in line for line in lines[:-1])


@pytest.mark.parametrize("spoil", [unknown_model_type, dataset_empty, too_many_devices])
def test_debug_adds_a_traceback(work, capfd, spoil):
    spoil(work)
    assert main([*work.arguments(), "--debug"])
    text = capfd.readouterr().err
    assert "Traceback (most recent call last)" in text
    the_line(text.splitlines()[-1])
    assert work.left_behind() == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_run_is_left_alone(work, capfd, kind):
    work.run.parent.mkdir()
    if kind == "folder":
        work.run.mkdir()
        (work.run / "precious").write_text("x")
    else:
        work.run.write_text("x")
        work.flags.append("--overwrite")
    assert main([*work.arguments(), "--quiet"]) == 1
    line = the_line(capfd.readouterr().err)
    assert str(work.run) in line and ("--overwrite" in line or "is a file" in line)
    assert work.left_behind() == ["run"]
    assert kind == "file" or os.listdir(work.run) == ["precious"]


def test_a_failed_overwrite_keeps_the_old_run(work, capfd):
    with RunDirectory(work.run, command="compute") as part:
        (part / "precious").write_text("x")
    nan_in_weights(work)
    assert main([*work.arguments(), "--overwrite", "--quiet"]) == 1
    assert "manifest" not in the_line(capfd.readouterr().err)
    assert work.left_behind() == ["run"]
    assert sorted(os.listdir(work.run)) == ["manifest.json", "precious"]


@pytest.mark.parametrize(
    ("factor", "flags", "words"),
    [
        # 1e20 is a number, its square in float32 is not; the loss is as it was.
        (1e20, [], [FIRST_LINEAR, "activation", "NaN or infinity"]),
        # Fits float32, not float16, in which it would be stored.
        (1e3, ["--hessian_dtype=fp16"], [FIRST_LINEAR, "float16", "fp32"]),
    ],
    ids=["float32", "float16"],
)
def test_factors_that_overflow_are_named(work, capfd, factor, flags, words):
    work.scale_first_input(factor)
    work.flags += ["--use_dataset_labels", "--method=kfac", *flags]
    assert main([*work.arguments(), "--quiet"]) == 1
    line = the_line(capfd.readouterr().err)
    assert all(word in line for word in words), line
    assert work.left_behind() == []


def test_a_loss_that_overflows_says_so(work, capfd):
    def change(tensors):
        tensors["transformer.ln_f.weight"] *= np.float32(1e38)

    work.weights(change)
    assert main([*work.arguments(), "--use_dataset_labels", "--method=kfac", "--quiet"]) == 1
    assert "loss" in the_line(capfd.readouterr().err)
    assert work.left_behind() == []


class FullDisk:
    """A file on a disk with room for `room` more bytes."""

    room = 20_000

    def __init__(self, path, mode):
        self._file = open(path, mode)  # noqa: SIM115

    def write(self, data):
        FullDisk.room -= len(data)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def test_a_full_disk(work, capfd, monkeypatch):
    monkeypatch.setattr(shards, "open", FullDisk, raising=False)
    assert main([*work.arguments(), "--use_dataset_labels", "--method=kfac", "--quiet"]) == 1
    line = the_line(capfd.readouterr().err)
    assert "the disk is full; free some space" in line and str(work.run) in line
    assert work.left_behind() == []


def command(work: Work, first: str = "pass") -> subprocess.Popen:
    """The command as a process of its own, on one device, `first` having been executed."""
    flags = ["--use_dataset_labels", "--method=kfac"]
    # A shell's background job hands SIGINT down ignored, and the command respects that.
    hears = "import signal as s; s.signal(s.SIGINT, s.default_int_handler)"
    program = f"{hears}; {first}; import runpy; runpy.run_module('jhessians', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", program, *work.arguments(), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )


def test_a_file_size_limit(work):
    """A real refusal of the operating system, in the middle of a shard."""

    limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (9_000, 9_000))"
    process = command(work, first=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "limit" in the_line(errors.splitlines()[-1])
    assert "Traceback" not in errors
    assert work.left_behind() == []


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated by SIGTERM")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_ends_a_run_cleanly(work, number, code, word):
    # Long enough to be hit in the middle: the same documents over and over.
    work.flags += ["--max_tokens=20000000", "--checkpoint_minutes=0"]
    process = command(work)
    assert process.stderr is not None
    seen = []
    try:
        for line in process.stderr:
            seen.append(line)
            if line.startswith("Covariances"):
                time.sleep(2)
                break
        assert work.left_behind() == ["run.part"], seen
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert the_line(errors.splitlines()[-1]).endswith(word)
    assert "Traceback" not in errors
    assert work.left_behind() == []


def test_a_signal_that_meets_a_finalizer_is_not_lost():
    """Python drops an exception that is raised there."""

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        with unwound_by_signals():
            Dying()
            time.sleep(10)
