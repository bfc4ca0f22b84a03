"""Odd values, files and surroundings: each is refused in one line, before any work is done."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import datasets.config
import jax
import pytest

from jhessians.cli import memory
from jhessians.cli.main import main
from jhessians.commands.table import COMMANDS
from jhessians.config import machine
from jhessians.config.option import check, options_of
from jhessians.errors import ConfigError, DatasetError, printable
from jhessians.report.progress import Progress
from tests.cli.work import SUMMARY, failing, only_error, the_line

SAMPLED = ["--method", "kfac"]
LABELLED = [*SAMPLED, "--fisher_type", "dataset"]
RED = "\x1b[31m"

# Of a whole command line that names a run: what is typed, and words of the answer.
TYPED = [
    (["--mc_samples", "1000000000000"], "--mc_samples must be at most 2147483647, got 1000"),
    (["--token_batch_size", "9" * 400], "--token_batch_size must be at most 2147483647, got one"),
    (["--max_tokens", "9" * 30], "--max_tokens must be at most 9223372036854775807, got 999"),
    (["--seed", "9" * 6000], "--seed: invalid int value: '9999"),
    (["--modules", ""], "--modules is empty; give names, or leave it out for every linear"),
    (["--modules", ",", " "], "--modules is empty"),
    (["--module_partitions", "0"], "--module_partitions must be at least 1, got 0"),
    (["--module_partitions", "all"], "'all' is no number, nor auto"),
    ([*LABELLED, "--label_smoothing", "nan"], "--label_smoothing takes a finite number, got nan"),
    ([*LABELLED, "--label_smoothing", "inf"], "--label_smoothing must be at most 1.0, got inf"),
    (["--num_shards", "1000000"], "--num_shards 1000000 needs as many open files"),
]


@pytest.mark.parametrize(("typed", "words"), TYPED, ids=[" ".join(t)[:40] for t, _ in TYPED])
def test_values(capsys, pipeline, monkeypatch, typed, words):
    monkeypatch.setattr(machine, "_open_files", lambda: 1024)
    assert main(["compute", "r", *typed]) == 2
    line = only_error(capsys)
    assert words in line and len(line) < 500
    assert pipeline.calls == []


def test_shards_as_many_as_files_may_be_open(pipeline):
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - machine.SPARE_FILES
    assert main(["compute", "r", "--num_shards", str(most), "--quiet"]) == 0
    assert main(["compute", "r", "--num_shards", str(most + 1), "--quiet"]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_no_number_of_any_command_is_without_bounds(name):
    for option in options_of(COMMANDS[name].config):
        if option.value_type == "integer":
            for value in (2**63, -(2**63) - 1):
                with pytest.raises(ConfigError, match=f"--{option.name} "):
                    check(option, value)
        if option.value_type == "number":
            for value in (float("nan"), float("inf"), -float("inf"), 10**400):
                with pytest.raises(ConfigError, match=f"--{option.name} "):
                    check(option, value)


# Of a file for --config: its text, and words of the answer.
FILES = {
    "lists": ("[" * 20_000 + "]" * 20_000, "is not YAML"),
    "tables": ('{"a":' * 20_000 + "1" + "}" * 20_000, "is not YAML"),
    "digits": (f"jhessians: {{compute: {{seed: {'9' * 9000}}}}}", "is not YAML"),
    "hexadecimal": (
        f"jhessians: {{compute: {{run_path: r, max_tokens: 0x{'f' * 9000}}}}}",
        "--max_tokens must be at most 9223372036854775807, got one far beyond",
    ),
    "zero": ("jhessians: {compute: {run_path: r, module_partitions: 0}}", "at least 1, got 0"),
    "nan": ("jhessians: {compute: {run_path: r, label_smoothing: .nan}}", "got nan"),
    "no path": ("jhessians: {compute: {seed: 3}}", "has no run_path; give the folder to write"),
}


@pytest.mark.parametrize("name", FILES)
def test_config_files(capsys, pipeline, tmp_path, name):
    text, words = FILES[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["compute", "--config", str(path)]) == 2
    assert words in only_error(capsys)
    assert pipeline.calls == []


def test_a_folder_that_is_given_need_not_stand_in_the_file(pipeline, tmp_path):
    (tmp_path / "config.yaml").write_text("jhessians: {compute: {seed: 3}}")
    assert main(["compute", "given", "--config", str(tmp_path), "--quiet"]) == 0
    assert [(call.run_path, call.seed) for call in pipeline.calls] == [("given", 3)]


def nested(work):
    (work.model / "config.json").write_text('{"a":' * 20_000 + "1" + "}" * 20_000)


def listed_type(work):
    work.settings(model_type=["gpt2"])


def more_layers_than_tensors(work):
    work.settings(n_layer=99_999)


def tokenizer_without_vocabulary(work):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (work.model / name).unlink()
    (work.model / "special_tokens_map.json").write_text("{}")


def latin_1(work):
    work.data.write_bytes(b'{"text": "plain"}\n{"text": "caf\xe9 au lait"}\n')


def latin_1_in_lines(work):
    work.data.write_bytes(b"plain\n\ncaf\xe9 au lait\n")
    work.data.rename(work.folder / "docs.txt")
    work.flags += [f"--dataset={work.folder / 'docs.txt'}"]


def utf_16(work):
    work.data.write_text('{"text": "some words"}\n', encoding="utf-16")


def revision_of_a_folder(work):
    work.flags += ["--revision=main"]


def more_tokens_than_memory(work):
    work.flags += ["--max_tokens=1000000000000000"]


def escapes_in_a_tensor(work):
    work.weights(lambda tensors: tensors.update({f"{RED}evil\n": tensors.popitem()[1]}))


def escapes_in_a_file(work):
    work.flags += [f"--dataset={RED}docs.jsonl"]


def escapes_in_a_column(work):
    work.write({f"{RED}texts": "some words"})


SPOILT = [
    (nested, ["config.json", "isn't valid JSON"]),
    (listed_type, ["config.json", "['gpt2']", "gpt2, gpt_neo"]),
    (more_layers_than_tensors, ["1199992 tensors", "the files hold 16", "number of layers"]),
    (tokenizer_without_vocabulary, ["tokenizer of", "no vocabulary", "--tokenizer"]),
    (latin_1, ["docs.jsonl', line 2, byte 0xe9 is no UTF-8, but Latin-1", "iconv"]),
    (latin_1_in_lines, ["docs.txt', line 3, byte 0xe9 is no UTF-8, but Latin-1", "iconv"]),
    (utf_16, ["docs.jsonl', line 1, byte 0xff is no UTF-8, but UTF-16"]),
    (revision_of_a_folder, ["--revision 'main'", "is a folder", "leave it out"]),
    (more_tokens_than_memory, ["--max_tokens", "4000000 GB", "give fewer"]),
    (escapes_in_a_tensor, ["unexpected", r"\x1b[31mevil"]),
    (escapes_in_a_file, [r"\x1b[31mdocs.jsonl"]),
    (escapes_in_a_column, [r"\x1b[31mtexts", "--prompt_column"]),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
def test_ingredients(work, capfd, spoil, words):
    spoil(work)
    assert main([*work.arguments(), "--quiet"]) == 1
    line = the_line(capfd.readouterr().err)
    assert "\x1b" not in line
    for word in words:
        assert word in line
    assert work.left_behind() == []


@pytest.mark.parametrize(
    "setting",
    [
        {"n_layer": 0}, {"n_layer": -1}, {"n_layer": 1_000_000}, {"n_layer": [1]},
        {"n_embd": 0}, {"n_embd": -24}, {"n_embd": 10**12}, {"n_embd": 24.5}, {"n_embd": None},
        {"n_head": 0}, {"n_head": -2}, {"n_head": 10**30}, {"n_inner": 0}, {"n_inner": -1},
        {"vocab_size": 0}, {"vocab_size": -5}, {"vocab_size": 10**12},
        {"max_position_embeddings": -1}, {"n_positions": -1}, {"n_positions": 0},
        {"activation_function": ["gelu"]}, {"layer_norm_epsilon": "small"},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_of_a_model(work, capfd, setting):
    settings = json.loads((work.model / "config.json").read_text())
    if "max_position_embeddings" in setting:
        settings.pop("n_positions")
    (work.model / "config.json").write_text(json.dumps(settings | setting))
    assert main([*work.arguments(), "--quiet"]) == 1
    line = the_line(capfd.readouterr().err)
    assert "config.json" in line and len(line) < 400
    assert next(iter(setting)).replace("max_position_embeddings", "n_positions") in line


def test_a_cache_that_cannot_be_written(work, capfd, monkeypatch):
    """As HF_HOME makes it, which is read when `datasets` is imported."""
    (work.folder / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(work.folder / "file" / "cache"))
    assert main([*work.arguments(), "--quiet"]) == 1
    line = the_line(capfd.readouterr().err)
    assert "file/cache, can't be written (Not a directory)" in line and "HF_HOME" in line


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no plugin (set JAX_PLATFORMS)")])
def test_no_devices(capsys, pipeline, monkeypatch, error):
    def no_devices():
        raise error

    pipeline.body = failing(error)
    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert main(["compute", "r"]) == 1
    line = only_error(capsys)
    assert "JAX finds no devices with JAX_PLATFORMS='cuda'" in line and "give cpu" in line
    assert ("no plugin" in line) == bool(str(error)) and "set JAX" not in line


def command(*arguments: str, first: str = "pass", **environment: str) -> tuple[int, str]:
    """Exit code and standard error of a process of its own, `first` having been executed."""
    program = f"{first}; import runpy; runpy.run_module('jhessians', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    return done.returncode, done.stderr


def test_unknown_devices(tmp_path):
    code, errors = command("compute", str(tmp_path / "run"), JAX_PLATFORMS="foo")
    assert code == 1 and "JAX_PLATFORMS='foo'" in the_line(errors)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("gigabytes", [1.2, 2.5])
def test_too_few_addresses(tmp_path, gigabytes):
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_AS, (int({gigabytes}e9),) * 2)"
    code, errors = command("compute", str(tmp_path / "run"), first=limit)
    assert code == 2 and f"ulimit -v allows {gigabytes} GB" in the_line(errors)
    assert os.listdir(tmp_path) == []


def caused(error, cause):
    error.__cause__ = cause
    return error


NO_ROOM = ImportError("libx.so: failed to map segment from shared object")


@pytest.mark.parametrize(
    ("error", "limit", "words"),
    [
        (OSError(12, "Cannot allocate memory"), None, "out of memory; try a smaller"),
        (RuntimeError("can't start new thread"), None, "out of memory; try a smaller"),
        (caused(DatasetError("can't be read"), MemoryError()), None, "out of memory; try"),
        (caused(DatasetError("can't be read"), NO_ROOM), 4 * 10**9, "ulimit -v allows 4.0 GB"),
        (SystemError("error without exception"), 4 * 10**9, "ulimit -v allows 4.0 GB"),
        (DatasetError("no such column"), 4 * 10**9, "no such column"),
        (caused(DatasetError("can't be read"), FileNotFoundError(2, "x")), 4 * 10**9, "be read"),
    ],
)
def test_lack_of_memory_is_not_blamed_on_the_input(capsys, pipeline, monkeypatch, error, limit,
                                                   words):  # fmt: skip
    monkeypatch.setattr("jhessians.cli.console.reached_limit", lambda: limit)
    pipeline.body = failing(error)
    assert main(["compute", "r"]) == 1
    assert words in only_error(capsys)


def test_a_limit_is_reached_once_it_is_nearly_taken(monkeypatch):
    peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmPeak" in x)
    taken = int(peak.split()[1]) * 1024
    for limit, reached in ((taken, True), (2 * taken, False), (None, False)):
        monkeypatch.setattr(memory, "address_limit", lambda limit=limit: limit)
        assert memory.reached_limit() == (limit if reached else None)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain ünï → 漢字\u3000👩\u200d🔬\n", "plain ünï → 漢字\u3000👩\u200d🔬\n"),
        (f"{RED}red\x1b[0m\a\b\r\t\x7f", r"\x1b[31mred\x1b[0m\x07\x08\r\t\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb\u2028\udcff", r"a\u202eb\u2028\udcff"),
    ],
)
def test_printable(text, safe):
    assert printable(text) == safe


def test_no_outlet_passes_on_escapes(capsys, pipeline):
    """Notes, warnings, tracebacks and the summary."""

    def body(config):
        progress = Progress()
        progress.note(f"note {RED}")
        progress.warn(f"warn {RED}")
        if config.quiet:
            raise DatasetError(f"error {RED}")
        return dataclasses.replace(SUMMARY, run_path=f"runs/{RED}")

    pipeline.body = body
    assert main(["compute", "r"]) == 0
    assert main(["compute", "r", "--quiet", "--debug"]) == 1
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    for words, text in (("note ", said.err), ("warn ", said.err), ("error ", said.err),
                        ("runs/", said.out)):  # fmt: skip
        assert rf"{words}\x1b[31m" in text
    assert "Traceback" in said.err
