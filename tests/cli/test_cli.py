"""The command line: help, spellings, replay, and one line and one code for every failure."""

import errno
import logging
import re
import subprocess
import sys
import warnings

import jax
import pytest

from jhessians.cli.main import main, parse
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.table import COMMANDS
from jhessians.config.option import options_of
from jhessians.errors import (
    CheckpointError,
    DatasetError,
    MeshError,
    NumericsError,
    OutputError,
)
from jhessians.interop.export import write_config
from jhessians.methods.autocorrelation_options import AUTOCORRELATION
from tests.cli.work import SUMMARY, failing, only_error


def parse_compute(arguments):
    return parse(COMMANDS["compute"], arguments)


def test_help_fits_80_columns_and_states_every_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compute", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    flat = " ".join(text.split())
    for each in options_of(ComputeConfig):
        assert re.search(rf"^  --{each.name} ", text, re.MULTILINE), each.name
        entry = flat.split(f" --{each.name} ", 1)[1].split("[default:", 1)[1]
        assert entry.startswith(f" {each.default_in_words}]"), each.name
        if each.value_type == "integer" and each.unit and not each.default_text:
            assert each.unit in each.default_in_words
    headings = re.findall(r"^(\w[\w ]+):$", text, re.MULTILINE)
    assert headings == [
        "general", "what to run on", "data", "numbers", "statistics", "machine", "output",
        "examples",
    ]  # fmt: skip
    examples = text.split("examples:\n")[1].replace("\\\n", "").strip().splitlines()
    assert len(examples) == 2
    for example in examples:
        assert parse_compute(example.split()[2:]) is not None


@pytest.mark.parametrize("columns", [50, 200])
def test_help_in_other_widths(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["compute", "-h"]) == 0
    head = capsys.readouterr().out.split("Flags may")[0].split("general:")[1]
    assert max(len(line) for line in head.splitlines()) <= min(columns, 100)


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from jhessians.cli.main import main; "
        "assert main(['compute', '--help']) == main(['--help']) == main(['--version']) == 0; "
        "heavy = {'jax', 'flax', 'transformers', 'datasets', 'torch'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_module_runs_and_passes_on_the_code():
    done = subprocess.run(
        [sys.executable, "-m", "jhessians", "compute"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("jhessians: error: RUN_PATH is missing")
    assert done.stderr.count("\n") == 1


def test_top_help_lists_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "compute" in text and max(len(line) for line in text.splitlines()) <= 80


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"jhessians \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_both_spellings_of_every_option():
    values = {"integer": "3", "number": "0.5", "flag": "true", "list": "a.*", "text": "word"}
    needs = {
        "normalize_trace": ["--method", "tkfac"],
        "loss_fn": ["--fisher_type", "dataset"],
        "label_smoothing": ["--fisher_type", "dataset"],
    }
    dense = ["--method", "autocorrelation"]
    sizes = [*dense, "--num_heads", "2", "--head_size", "4"]
    for each in options_of(ComputeConfig):
        if each.group == AUTOCORRELATION:
            needs[each.name] = [*dense, "--projection_dim", "8"]
    needs |= dict.fromkeys(
        ("num_heads", "head_size", "head_dim"), [*sizes, "--split_attention_modules", "a.*"]
    )
    needs["split_attention_modules"] = sizes
    for each in options_of(ComputeConfig):
        value = each.choices[-1] if each.choices else values[each.value_type]
        value = {"head_dim": "2", "method": "shampoo", "mesh": "4x2"}.get(each.name, value)
        context = ["r", "--model", "m", "--dataset", "d", *needs.get(each.name, [])]
        for name in {each.name, each.name.replace("_", "-")}:
            spaced = parse_compute([*context, f"--{name}", value])
            joined = parse_compute([*context, f"--{name}={value}"])
            assert spaced == joined
            got = getattr(spaced, each.name)
            assert got == {"2": 2, "3": 3, "0.5": 0.5, "true": True, "a.*": ("a.*",)}.get(
                value, value
            )


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--fsdp", "r"], True),
        (["r", "--fsdp"], True),
        (["--fsdp", "true", "r"], True),
        (["--fsdp", "False", "r"], False),
        (["--fsdp=no", "r"], False),
        (["--fsdp", "--quiet", "r"], True),
        (["r"], False),
    ],
)
def test_flags(arguments, value):
    config = parse_compute(arguments)
    assert config.run_path == "r" and config.fsdp is value


def test_modules_take_several_words():
    config = parse_compute(["r", "--modules", "a.*", "b", "--seed", "1"])
    assert config.modules == ("a.*", "b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command given"),
        (["comptue", "r"], "did you mean compute?"),
        (["fit"], "there are: compute"),
        (["compute"], "RUN_PATH is missing"),
        (["compute", "--modules", "a", "r"], "put it before --modules"),
        (["compute", "r", "--token-batchsize", "3"], "did you mean --token_batch_size"),
        (["compute", "r", "-model", "m"], "did you mean --model"),
        (["compute", "r", "--xyzzy"], "unknown option --xyzzy; see --help"),
        (["compute", "r", "--trunc"], "unknown option --trunc"),
        (["compute", "r", "s"], "unrecognized arguments: s"),
        (["compute", "r", "--seed"], "--seed: expected one argument"),
        (["compute", "r", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["compute", "r", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["compute", "r", "--fsdp=maybe"], "'maybe' is neither true nor false"),
        (["compute", "r", "--method", "tkfak"], "kfac_reduce, autocorrelation; did you mean"),
        (["compute", "r", "--model", "m"], "--model is given without --dataset"),
        (["compute", "r", "--ev_correction", "false"], "use --method kfac"),
        (["compute", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_usage_errors(capsys, pipeline, arguments, words):
    assert main(arguments) == 2
    assert words in only_error(capsys)
    assert pipeline.calls == []


def test_summary_on_standard_output(capsys, pipeline):
    assert main(["compute", "runs/x"]) == 0
    captured = capsys.readouterr()
    assert "ekfac factors are in runs/x" in captured.out
    assert captured.err == ""
    assert pipeline.calls == [ComputeConfig(run_path="runs/x")]


def test_quiet_prints_nothing(capsys, pipeline):
    def body(config):
        assert config.quiet
        warnings.warn("hush", stacklevel=1)
        logging.getLogger("jhessians").warning("hush")
        return SUMMARY

    pipeline.body = body
    assert main(["compute", "r", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_other_processes_print_no_summary(capsys, pipeline):
    pipeline.is_first_host = lambda: False
    assert main(["compute", "r"]) == 0
    assert capsys.readouterr().out == ""


class FakeXlaError(jax.errors.JaxRuntimeError):
    pass


def chained(error, cause):
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "runs/x.part/shard_0.safetensors")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CheckpointError("no tensor\n  named a"), 1, "no tensor named a"),
        (DatasetError("empty"), 1, "error: empty"),
        (MeshError("8 devices asked, 1 exists"), 1, "8 devices asked"),
        (NumericsError("NaN in layers.0"), 1, "layers.0"),
        (OutputError("runs/x exists"), 1, "runs/x exists"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FULL, 1, "the disk is full while writing runs/x.part/shard_0.safetensors"),
        (chained(RuntimeError("cannot write"), FULL), 1, "the disk is full"),
        (PermissionError(errno.EACCES, "denied", "/etc/x"), 1, "no permission for /etc/x"),
        (FakeXlaError("RESOURCE_EXHAUSTED: 9 GiB\nmore"), 1, "smaller --token_batch_size"),
        (MemoryError(), 1, "smaller --token_batch_size"),
        (BrokenPipeError(), 70, "unexpected BrokenPipeError (run"),
        (FakeXlaError("INTERNAL: oops"), 70, "FakeXlaError: INTERNAL: oops"),
        (KeyError("layers.0"), 70, "unexpected KeyError: 'layers.0' (run again with --debug"),
        (ValueError("long " * 1000), 70, "ValueError: long"),
        (AssertionError(), 70, "unexpected AssertionError (run"),
    ],
)
def test_failures_take_one_line(capsys, pipeline, error, code, words):
    pipeline.body = failing(error)
    assert main(["compute", "r"]) == code
    line = only_error(capsys)
    assert words in line and len(line) < 500


def test_debug_adds_the_traceback(capsys, pipeline):
    pipeline.body = failing(DatasetError("empty"))
    assert main(["compute", "r", "--debug"]) == 1
    captured = capsys.readouterr().err
    assert "Traceback" in captured and "work.py" in captured
    assert captured.splitlines()[-1] == "jhessians: error: empty"


def test_a_broken_pipeline_import_is_a_fault(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jhessians.commands.compute.pipeline", None)
    assert main(["compute", "r"]) == 70
    assert "ModuleNotFoundError" in only_error(capsys)


def test_option_names_in_errors_become_flags(capsys, pipeline):
    message = "`max_tokens` 1 is too few: raise it, see `devices` or `jhessians compute`"
    pipeline.body = failing(DatasetError(message))
    assert main(["compute", "runs/x", "--quiet"]) == 1
    # Words that are no option of this command stay as they are.
    expected = message.replace("`max_tokens`", "--max_tokens")
    assert only_error(capsys) == f"jhessians: error: {expected}"


def test_a_reader_that_leaves_early_is_no_error():
    done = subprocess.run(
        f"set -o pipefail; {sys.executable} -m jhessians compute --help | true",
        shell=True, executable="/bin/bash", capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "" and done.returncode == 0


@pytest.fixture
def fresh_transformers(monkeypatch):
    """The logger as it is before transformers is imported, which another test may have done."""
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(level)


def test_warnings_and_logs_take_one_line_each(capsys, pipeline, fresh_transformers):
    def body(config):
        warnings.warn("3 documents are\nunder 2 tokens", UserWarning, stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.tokenization").warning("chatter")
        logging.getLogger("jhessians.data").warning("padded %d", 3)
        logging.getLogger("jhessians.data").info("detail")
        return SUMMARY

    pipeline.body = body
    # pytest catches logs and warnings by itself; both are put back at the end of `main`.
    assert main(["compute", "r"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "jhessians: warning: 3 documents are under 2 tokens",
        "jhessians: warning: padded 3",
    ]
    assert logging.getLogger("transformers").level == logging.NOTSET


def test_debug_lets_the_libraries_speak(capsys, pipeline, fresh_transformers):
    def body(config):
        logging.getLogger("transformers.tokenization").warning("chatter")
        return SUMMARY

    pipeline.body = body
    assert main(["compute", "r", "--debug"]) == 0
    assert "jhessians: warning: chatter" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--precision", "--hessian_dtype"])
def test_fp64_reaches_jax_and_leaves_it_again(pipeline, option):
    def body(config):
        pipeline.x64 = jax.config.read("jax_enable_x64")
        return SUMMARY

    before = jax.config.read("jax_enable_x64")
    pipeline.body = body
    assert main(["compute", "r", option, "fp64"]) == 0
    assert pipeline.x64 is True
    assert main(["compute", "r", option, "fp32"]) == 0
    assert pipeline.x64 is before
    pipeline.body = failing(DatasetError("empty"))
    assert main(["compute", "r", option, "fp64"]) == 1
    assert jax.config.read("jax_enable_x64") is before


def test_replay(tmp_path, pipeline):
    first = ComputeConfig(
        run_path="runs/first", model="m", dataset="d", seed=5, modules=("a", "b"), overwrite=True
    )
    document = first.document(model="m", dataset="d", shards=1)
    write_config(tmp_path, document, {})
    assert main(["compute", "--config", str(tmp_path / "config.yaml")]) == 0
    assert main(["compute", "runs/second", "--config", str(tmp_path), "--seed", "6"]) == 0
    replayed, changed = pipeline.calls
    # Overwriting is asked for anew each time.
    assert replayed.resolved_dict() == first.resolved_dict() | {"overwrite": False}
    assert (changed.run_path, changed.seed, changed.model) == ("runs/second", 6, "m")
