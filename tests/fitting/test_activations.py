"""Activations stored or recomputed: the same factors, and as much memory as was said."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest
from flax import nnx

import jhessians
from jhessians.capture.problem import Problem
from jhessians.capture.sites import find_sites
from jhessians.capture.traversal import accumulate, initialize
from jhessians.cli.main import main
from jhessians.commands import problem as command_problem
from jhessians.commands.compute import pipeline
from jhessians.commands.compute.config import ComputeConfig
from jhessians.data.batching import BatchPlan
from jhessians.errors import ConfigError
from jhessians.fitting import partitions
from jhessians.fitting.activations import choose, largest_batch, stored_bytes
from jhessians.fitting.partitions import factor_bytes
from jhessians.models.config import ExpertsConfig, MLPConfig
from tests import small
from tests.oracles import checkpoints
from tests.test_invariance import compare

STORE, RECOMPUTE = "store", "recompute"
WIDE = {"hidden_size": 32, "heads": 2, "key_value_heads": 2, "head_size": 16, "mlp_size": 128}
EXPERTS = ExpertsConfig(
    4, 2, MLPConfig(32, "silu", "fused", bias=True), shared=MLPConfig(8, "silu")
)
KINDS = {
    "plain": {},
    "gated": small.LLAMA | {"key_value_heads": 2},
    "experts": {"experts": EXPERTS},
}
ESTIMATE = 0.15
"""Relative: recomputing, a device still holds one layer's activations of 16, and XLA reuses what
other arrays leave."""


def shapes(documents: int, positions: int):
    """A batch of no numbers."""
    plan = BatchPlan((), frozenset({(documents, positions)}), padding_share=0, skipped=0)
    return largest_batch(plan, small.batches(small.documents([2]))[0], devices=1)


def test_factors_are_the_same():
    data = small.documents([16, 9, 12, 5])
    results = {}
    model, batches = small.decoder(**small.LLAMA), small.batches(data)
    loss = jhessians.NextTokenLoss("dataset")
    problem = Problem(loss, model, find_sites(loss, model, batches[0]))
    for choice in (STORE, RECOMPUTE):
        results[choice] = jhessians.fit(
            replace(problem, activations=choice), batches,
            positions=data.positions, documents=len(data), correct_eigenvalues=False,
        )  # fmt: skip
    assert model.layers.save_products  # the caller's model is left as it was
    compare(results[RECOMPUTE], results[STORE])


def temporary_bytes(problem, batch) -> int:
    """What XLA sets aside for a pass, sums not counted."""
    fold = jhessians.Covariance()
    graph, state = nnx.split(problem.model)

    # Memory is assigned before LLVM comes to optimise.
    @partial(jax.jit, donate_argnums=2, compiler_options={"xla_backend_optimization_level": 0})
    def step(state, batch, sums):
        return accumulate(fold, problem.of(nnx.merge(graph, state)), batch, sums)

    sums = jax.eval_shape(lambda: initialize(fold, problem))
    return step.lower(state, batch, sums).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["gated", "experts"])
def test_the_estimate_is_what_xla_saves(kind):
    model = small.decoder(**WIDE | KINDS[kind], layers=16)
    loss, batch = jhessians.NextTokenLoss(), shapes(8, 64)
    problem = Problem(loss, model, find_sites(loss, model, batch))
    expected = stored_bytes(problem, batch)
    took = {}
    for choice in (STORE, RECOMPUTE):
        chosen = replace(problem, activations=choice)
        took[choice] = temporary_bytes(chosen, batch)
        # The problem's own setting doesn't matter to the estimate.
        assert stored_bytes(chosen, batch) == expected
    assert abs(took[STORE] - took[RECOMPUTE] - expected) < ESTIMATE * expected, (took, expected)


def test_what_is_stored_is_counted():
    """Query, key and value in one, attention with its normalizers, output, up; down is not read."""
    model, loss = small.decoder(**WIDE, layers=3), jhessians.NextTokenLoss()
    for documents, positions in [(4, 64), (2, 16)]:
        batch = shapes(documents, positions)
        problem = Problem(loss, model, find_sites(loss, model, batch))
        numbers = 3 * 32 + (32 + 2) + 32 + 128
        assert stored_bytes(problem, batch) == 4 * documents * positions * 3 * numbers


def test_the_largest_batch_of_a_device():
    plan = BatchPlan((), frozenset({(4, 32), (20, 8), (2, 64)}), padding_share=0, skipped=0)
    batch = largest_batch(plan, small.batches(small.documents([2]))[0], devices=2)
    assert batch.tokens.shape == batch.position_mask.shape == (10, 8)
    assert batch.document.shape == (10,) and batch.position_mask.dtype == bool


def test_stored_where_half_of_what_is_free_is_enough():
    assert choose(50, 100) == STORE
    assert choose(51, 100) == choose(1, 0) == RECOMPUTE


def run(folder: Path, path: Path, free: int, monkeypatch, **options) -> tuple[ComputeConfig, list]:
    """What a run with so much free memory records, and what it says; nothing is fitted."""
    config = ComputeConfig(
        str(path), model=str(folder), dataset=str(folder / "docs.jsonl"), world_size=1,
        truncation=True, **options,
    )  # fmt: skip
    monkeypatch.setattr(command_problem, "free_memory", lambda: free)
    monkeypatch.setattr(type(config.chosen), "fit", lambda method, run: None)
    monkeypatch.setattr(pipeline, "_spectrum", lambda config, folder: ())
    summary = pipeline.compute(config)
    return ComputeConfig.from_yaml(path), list(summary.notes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = checkpoints.build("llama", tmp_path_factory.mktemp("llama"), seed=3)
    checkpoints.corpus(folder, 4)
    return folder


@pytest.mark.parametrize("method", ["kfac", "autocorrelation"])
def test_automatic_looks_at_memory_and_records_its_choice(folder, tmp_path, monkeypatch, method):
    options = {"method": method} | ({} if method == "kfac" else {"projection_dim": 2})
    recorded, said = run(folder, tmp_path / "much", 1 << 40, monkeypatch, **options)
    assert recorded.activations == STORE and not said
    recorded, said = run(folder, tmp_path / "little", 1, monkeypatch, **options)
    assert recorded.activations == RECOMPUTE
    (line,) = said
    pattern = (
        r"Activations are recomputed: stored they take \d+\.\d kB a device, where 0 B are free"
    )
    assert re.match(pattern, line), line


def test_statistics_come_first(folder, tmp_path, monkeypatch):
    """What is free for activations is what factors leave; asked for by name, nothing is decided."""
    sizes = []

    def taken(*arguments, **options):
        sizes.append(factor_bytes(*arguments, **options))  # on the one device
        return sizes[-1]

    monkeypatch.setattr(partitions, "factor_bytes", taken)
    _, said = run(folder, tmp_path / "first", 1, monkeypatch, method="kfac")
    stored = float(re.search(r"take (\S+) kB", said[0])[1]) * 1000
    free = round(sizes[0] + 1.9 * stored)
    recorded, said = run(folder, tmp_path / "second", free, monkeypatch, method="kfac")
    assert recorded.activations == RECOMPUTE and len(said) == 1
    free = round(sizes[0] + 2.1 * stored)
    recorded, said = run(folder, tmp_path / "third", free, monkeypatch, method="kfac")
    assert recorded.activations == STORE and not said
    explicit = {"method": "kfac", "activations": "store"}
    recorded, said = run(folder, tmp_path / "fourth", 1, monkeypatch, **explicit)
    assert recorded.activations == STORE and not said


def test_other_words_are_refused(capsys):
    with pytest.raises(ConfigError, match="--activations 'some' is not one of auto, store, recom"):
        ComputeConfig("runs/x", activations="some")
    assert main(["compute", "runs/x", "--activations", "recomputed"]) == 2
    assert "did you mean recompute?" in capsys.readouterr().err
