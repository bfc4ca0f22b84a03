"""Progress on a terminal, away from one and quiet; the closing summary; numbers in words."""

import io
import os
import re

import pytest
from rich.console import Console

from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.next_steps import next_steps
from jhessians.config.units import bytes_in_words, rate_in_words, seconds_in_words
from jhessians.report.progress import Progress
from jhessians.report.summary import Summary, Tree, measure_trees, render


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def recorded(*, terminal, quiet=False, clock=None):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80, color_system=None)
    return Progress(quiet=quiet, console=console, clock=clock or Clock()), stream


def run_stage(progress, clock, *, steps=20, amount=50, first=11.0, each=1.0):
    with progress.stage("Covariances", total=steps * amount, unit="positions") as stage:
        for step in range(steps):
            clock.now += each if step else first
            stage.advance(amount)


def test_plain_lines():
    clock = Clock()
    progress, stream = recorded(terminal=False, clock=clock)
    run_stage(progress, clock)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Covariances: 1,000 positions ..."
    # After 100 of 1,000 positions only the second step of 1 s counts: 50 a second.
    assert lines[1] == "Covariances: 10 %, 50 positions/s, 18 s left"
    assert [re.search(r"(\d+) %", line).group(1) for line in lines[1:-1]] == [
        str(tenth * 10) for tenth in range(1, 10)
    ]
    assert lines[-1] == "Covariances: 1,000 positions in 30 s, 50 positions/s"
    assert "\x1b" not in stream.getvalue()
    assert progress.timings == {"Covariances": 30.0}


def test_plain_steps_over_several_tenths_make_one_line():
    clock = Clock()
    progress, stream = recorded(terminal=False, clock=clock)
    run_stage(progress, clock, steps=3, amount=1)
    assert len(stream.getvalue().splitlines()) == 4  # start, 33 %, 66 %, end


def test_terminal_bar():
    clock = Clock()
    progress, stream = recorded(terminal=True, clock=clock)
    with progress.stage("Covariances", total=1000, unit="positions") as stage:
        for _ in range(10):
            clock.now += 1.0
            stage.advance(50)
        clock.now += 0.5
    text = stream.getvalue()
    assert "\x1b[" in text
    final = text.splitlines()[-1]
    assert "Covariances: 500 positions in 10 s, 50 positions/s" in final
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line) for line in text.splitlines()]
    assert all(len(line) <= 80 for line in drawn[:-1])
    assert any("50 %" in line.replace("50%", "50 %") for line in drawn), drawn
    assert any("50 positions/s" in line and "s left" in line for line in drawn), drawn


def test_terminal_without_total_shows_a_spinner():
    clock = Clock()
    progress, stream = recorded(terminal=True, clock=clock)
    with progress.stage("Load [model]"):
        clock.now += 2.0
    assert stream.getvalue().splitlines()[-1].endswith("Load [model]: done in 2.0 s")


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_prints_nothing_but_keeps_time(terminal):
    clock = Clock()
    progress, stream = recorded(terminal=terminal, quiet=True, clock=clock)
    run_stage(progress, clock)
    progress.note("hello")
    assert stream.getvalue() == ""
    assert progress.timings == {"Covariances": 30.0}


def test_note_is_one_line_even_if_long():
    progress, stream = recorded(terminal=False)
    progress.note("x " * 100)
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failing_stage_keeps_its_time_and_claims_nothing(terminal):
    clock = Clock()
    progress, stream = recorded(terminal=terminal, clock=clock)
    with pytest.raises(KeyboardInterrupt), progress.stage("Export", total=2, unit="modules"):
        clock.now += 3.0
        raise KeyboardInterrupt
    assert " in 3.0 s" not in stream.getvalue()
    assert progress.timings == {"Export": 3.0}
    with progress.stage("Export"):
        clock.now += 1.0
    assert progress.timings == {"Export": 4.0}


def test_stages_do_not_nest():
    progress, _ = recorded(terminal=False)
    with progress.stage("Outer"), pytest.raises(RuntimeError, match="inside stage 'Outer'"):
        with progress.stage("Inner"):
            pass


def test_empty_stage_has_no_rate():
    progress, stream = recorded(terminal=False)
    with progress.stage("Eigendecomposition", total=0, unit="modules") as stage:
        assert (stage.rate, stage.seconds_left, stage.share) == (None, None, 1.0)
    assert stream.getvalue().splitlines()[-1] == "Eigendecomposition: done in 0.0 s"


def test_goes_to_standard_error(capsys):
    with Progress().stage("Load"):
        pass
    captured = capsys.readouterr()
    assert captured.out == "" and "Load: done" in captured.err


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
        (185, "3 min 05 s"), (3599.7, "1 h 00 min"), (7800, "2 h 10 min"),
    ],
)  # fmt: skip
def test_seconds_in_words(value, words):
    assert seconds_in_words(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_940, "999.9 kB"), (999_990, "1.0 MB"),
        (1_300_000_000, "1.3 GB"), (5_000_000_000_000_000, "5000.0 TB"),
    ],
)  # fmt: skip
def test_bytes_in_words(value, words):
    assert bytes_in_words(value) == words


def test_slow_rates_are_per_minute():
    assert rate_in_words(1234.5, "positions") == "1,234 positions/s"
    assert rate_in_words(2.5, "modules") == "2.5 modules/s"
    assert rate_in_words(0.1, "modules") == "6.0 modules/min"


def test_measure_trees_counts_hard_links_once(tmp_path):
    run = tmp_path / "run"
    for folder in ("activation_sharded", "influence_results/activation_covariance_sharded"):
        (run / folder).mkdir(parents=True)
    shard = run / "activation_sharded" / "shard_0.safetensors"
    shard.write_bytes(b"x" * 1000)
    os.link(shard, run / "influence_results/activation_covariance_sharded" / shard.name)
    (run / "influence_results" / "total_processed.pt").write_bytes(b"y" * 10)
    (run / "config.yaml").write_bytes(b"z" * 5)
    trees, disk = measure_trees(run)
    assert trees == [
        Tree("activation_sharded/", files=1, bytes=1000),
        Tree("influence_results/", files=2, bytes=1010, shared_bytes=1000),
        Tree("config.yaml", files=1, bytes=5),
    ]
    assert disk == 1015


def summary_of(**more):
    values = {
        "run_path": "runs/demo",
        "method": "ekfac",
        "modules": 28,
        "documents": 1024,
        "skipped_documents": 3,
        "positions": 32640,
        "padding_share": 0.0812,
        "devices": "2 x cpu",
        "number_format": "float32, stored in bfloat16",
        "timings": {"Load model": 1.25, "Covariances": 30.0, "Eigendecomposition": 8.0},
        "trees": [
            Tree("eigenvalue_correction_sharded/", 2, 4_200_000),
            Tree("influence_results/", 11, 9_000_000, 8_500_000),
            Tree("config.json, config.yaml, processor_config.json, total_processed.pt", 4, 3000),
        ],
        "disk_bytes": 4_703_000,
        "warnings": ["a warning that is long enough to need " + "more room " * 8],
    }
    return Summary(**(values | more))


def test_summary_fits_80_columns_and_says_it_all():
    shell, python = next_steps(
        ComputeConfig(run_path="runs/demo"), model="m", dataset="d.jsonl", shards=2
    )
    text = render(summary_of(next_shell=shell, next_python=python))
    assert max(len(line) for line in text.splitlines()) <= 80
    for words in (
        "ekfac factors are in runs/demo", "28", "1,024 documents", "3 skipped", "2 x cpu",
        "  model    float32, stored in bfloat16",
        "8.1% of the positions that are computed",
        "32,640 positions", "Covariances", "30 s", "76%", "4.7 MB on disk", "eigenvalue_correction",
        "2 files", "4.2 MB", "8.5 MB shared", "processor_config.json", "needs more room"[6:],
        "bergson ekfac runs/demo-scores", "--nproc_per_node 2", "from_path('runs/demo', ev_corr",
    ):  # fmt: skip
        assert words in text, words


def test_summary_without_extras():
    text = render(summary_of(timings={}, trees=[], warnings=[], skipped_documents=0))
    for words in ("Warnings", "Next", "skipped", "Time per stage"):
        assert words not in text


def test_next_steps_carry_what_differs_from_bergson():
    config = ComputeConfig(
        run_path="runs/x/hessian/kfac",
        model="org/m",
        dataset="my docs.jsonl",
        truncation=True,
        split="test",
        include_bias=True,
        moe_experts="*.experts, x",
    )
    shell, _ = next_steps(
        config, model="org/m", dataset="my docs.jsonl", shards=3, model_max_length=512
    )
    assert shell.startswith("bergson ekfac runs/x ")
    assert "ln " not in shell
    for words in (
        "--data.dataset 'my docs.jsonl'", "--query.split test", "--data.truncation true",
        "--include_bias true", "--token_batch_size 512", "--hessian_cfg.ev_correction true",
        "--moe_experts '*.experts, x'",
    ):  # fmt: skip
        assert words in shell


def test_next_steps_leave_out_what_bergson_would_get_wrong():
    config = ComputeConfig(run_path="r", modules=("*.mlp.*",))
    shell, python = next_steps(config, model="m", dataset="d", shards=1)
    assert shell == "" and "from_path('r'" in python
    config = ComputeConfig(run_path="r", layout="influence_results")
    assert next_steps(config, model="m", dataset="d", shards=1) == ("", "")
