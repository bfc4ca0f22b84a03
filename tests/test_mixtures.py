"""Whole runs with a mixture of experts: every method against bergson, and bergson as the reader.

An expert's unit is what a document has routed to it, so factored methods other than KFAC are
compared with bergson a document at a time.
"""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bergson import GradientProcessor as TheirProcessor

from jhessians.cli.main import main
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.errors import CheckpointError
from tests.oracles import bergson, checkpoints
from tests.small import relative_error
from tests.test_bergson import error, errors, factor_errors
from tests.test_hosts import Hosts
from tests.tolerances import DAMPED_INVERSE, FACTORS, INVARIANCE

GLOB = "model.layers.*.mlp.experts"
SIZES = {
    "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 12, "num_local_experts": 4, "num_hidden_layers": 2,
}  # fmt: skip
LENGTHS = (2, 40, 9, 1, 25, 3, 60)
SUBSET = "layers.0.*,*.down_proj"  # to leave out


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = checkpoints.build("mixtral", tmp_path_factory.mktemp("models"), seed=1, **SIZES)
    checkpoints.corpus(folder, 12, lengths=LENGTHS)
    checkpoints.corpus(folder, 3, seed=7, lengths=(8, 30, 17), name="query.jsonl")
    return folder


def ours(run, folder, **options):
    given = {
        "model": str(folder), "dataset": str(folder / "docs.jsonl"), "truncation": True,
        "token_batch_size": 128, "world_size": 1, "moe_experts": GLOB,
    }  # fmt: skip
    if options.get("method") != "autocorrelation":
        given["use_dataset_labels"] = True
    return compute(ComputeConfig(str(run), **given | options))


def theirs(folder, *extra, **options):
    words = ["--moe_experts", GLOB, *extra]
    return bergson.fit(folder, folder / "docs.jsonl", extra=words, **options)


@pytest.fixture(scope="module")
def ekfac(mixtral, tmp_path_factory):
    """Our EKFAC factors of all modules, and the summary."""
    run = tmp_path_factory.mktemp("ekfac") / "run"
    return run, ours(run, mixtral)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tkfac", "shampoo"])
def test_factored_methods_by_document(mixtral, tmp_path, method, record_property):
    summary = ours(
        tmp_path / "run", mixtral, method=method, ev_correction=True, filter_modules=SUBSET
    )
    assert not summary.warnings
    reference = theirs(mixtral, "--filter_modules", SUBSET, method=method, max_batch_size=1)
    found, expected = bergson.read(tmp_path / "run"), bergson.read(reference)
    assert set(found["activation_sharded"]) == set(expected["activation_sharded"])
    assert {n for n in found["activation_sharded"] if "expert" in n} == {
        f"layers.1.mlp.experts.expert_{e}.gate_up_proj" for e in range(4)
    }
    for kind, worst in factor_errors(found, expected).items():
        record_property(kind, worst)
        assert worst < FACTORS, kind


DENSE = {
    "per module": {"projection_dim": 4},
    "per module, unit rows": {"projection_dim": 5, "projection_type": "normal",
                              "projection_scale": "row_norm", "loss_reduction": "mean"},
    "global": {"projection_dim": 6, "projection_target": "global"},
    "whole": {"filter_modules": "layers.0.*,*.gate_up_proj,*self_attn*"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_autocorrelations(mixtral, tmp_path, name, record_property):
    options = dict(DENSE[name])
    ours(tmp_path / "run", mixtral, method="autocorrelation", **options)
    reduction = options.pop("loss_reduction", "sum")
    extra = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    reference = theirs(
        mixtral, *extra, method="autocorrelation", ev_correction=False, use_dataset_labels=False,
        loss_reduction=reduction,
    )  # fmt: skip
    found, expected = (TheirProcessor.load(run) for run in (tmp_path / "run", reference))
    assert set(found.hessians) == set(expected.hessians)
    worst = max(
        relative_error(found.hessians[n], np.asarray(h)) for n, h in expected.hessians.items()
    )
    record_property("error", worst)
    assert worst < FACTORS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adam", "adafactor"])
def test_estimated_normalizers(mixtral, tmp_path, kind, record_property):
    """bergson gets ours: of Adam as an optimizer's state, of Adafactor likewise."""
    options = {"projection_dim": 4, "filter_modules": SUBSET}
    run = tmp_path / "run"
    ours(run, mixtral, method="autocorrelation", normalizer=kind, layout="bergson", **options)
    processor = TheirProcessor.load(run)
    assert len(processor.normalizers) == 4 + 4
    for name, normalizer in processor.normalizers.items():
        # Elementwise from whole gradients, which the Grams of a run without a projection tell.
        moments = normalizer.state_dict()
        assert all(torch.isfinite(m).all() for k, m in moments.items() if k != "__class__"), name
    whole = tmp_path / "whole"
    ours(whole, mixtral, method="autocorrelation", filter_modules=SUBSET)
    for name, gram in TheirProcessor.load(whole).hessians.items():
        normalizer = processor.normalizers[name]
        if kind == "adam":
            squares = np.asarray(gram).diagonal().reshape(normalizer.weight_avg_sq.shape)
            found = {"weight": (normalizer.weight_avg_sq, squares)}
        else:
            shape = (len(normalizer.row), len(normalizer.col))
            squares = np.asarray(gram).diagonal().reshape(shape)
            found = {"row": (normalizer.row, squares.mean(1)),
                     "col": (normalizer.col, squares.mean(0))}  # fmt: skip
        for side, (mine, expected) in found.items():
            assert relative_error(mine, expected) < FACTORS, (name, side)


@pytest.mark.slow
def test_positions_are_counted_exactly_with_several_draws(mixtral, tmp_path):
    """Every draw counts a third, and sums are over the same positions."""
    one, three = (
        bergson.read((ours(tmp_path / str(k), mixtral, use_dataset_labels=False,
                           fisher_type="sampled", mc_samples=k, token_batch_size=64,
                           filter_modules="*self_attn*"), tmp_path / str(k))[1])
        for k in (1, 3)
    )  # fmt: skip
    # What depends on inputs alone is the same, its eigenvalues' divisor included.
    for folder in ("activation_sharded", "factor_eig_a"):
        assert max(errors(three[folder], one[folder]).values()) < INVARIANCE, folder
    for name, values in three["eigenvalue_sharded"].items():
        outer = np.outer(three["factor_eig_g"][name], three["factor_eig_a"][name])
        assert error(values, outer) < FACTORS
    tokens = checkpoints.encode(mixtral, mixtral / "docs.jsonl", max_length=64)
    positions = sum(max(len(t) - 1, 0) for t in tokens)
    for layer in range(2):
        # λ_A · sqrt(count / n_docs) beside the trace of A tells the count: trace / count summed.
        total = 0.0
        for expert in range(4):
            name = f"layers.{layer}.mlp.experts.expert_{expert}.gate_up_proj"
            trace = np.trace(three["activation_sharded"][name])
            root = three["factor_eig_a"][name].sum()  # trace / count · sqrt(count / n)
            count = (trace / root) ** 2 / len(tokens)
            assert abs(count - round(count)) < 1e-3 * count
            total += count
        assert total == pytest.approx(2 * positions, rel=1e-4)  # two experts for each token


@pytest.mark.slow
def test_float64(mixtral, tmp_path, record_property):
    left_out = "*self_attn*,layers.0.*"
    options = {
        "model": mixtral, "dataset": mixtral / "docs.jsonl", "truncation": "true", "world_size": 1,
        "token_batch_size": 128, "use_dataset_labels": "true", "moe_experts": GLOB,
        "filter_modules": left_out, "precision": "fp64", "hessian_dtype": "fp64",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    assert main(["compute", str(tmp_path / "run"), "--quiet", *flags]) == 0
    found = bergson.read(tmp_path / "run")
    expected = bergson.read(theirs(mixtral, "--filter_modules", left_out))
    worst = factor_errors(found, expected)
    for folder in ("activation_sharded", "gradient_sharded", "eigenvalue_correction_sharded"):
        record_property(folder, worst[folder])
        # Norms and the router's softmax are float32 on either side.
        assert worst[folder] < FACTORS / 10, folder


def test_bergson_reads_experts_factors(ekfac):
    run, _ = ekfac
    factors = bergson.read(run)
    rng = np.random.default_rng(0)
    gradients = {
        name: rng.standard_normal((2, *values.shape))
        for name, values in factors["eigenvalue_correction_sharded"].items()
    }
    applied = bergson.consume_from_path(run, gradients, damping_factor=0.1)
    for name, gradient in gradients.items():
        q_s = factors["eigen_gradient_sharded"][name]
        q_a = factors["eigen_activation_sharded"][name]
        values = factors["eigenvalue_correction_sharded"][name]
        damped = values + 0.1 * values.mean()
        expected = q_s @ ((q_s.T @ gradient @ q_a) / damped) @ q_a.T
        assert error(applied[name], expected) < DAMPED_INVERSE, name


def test_the_summarys_command_scores_with_them(mixtral, ekfac, tmp_path):
    """Word for word; then bergson's own factors give the same scores."""
    run, summary = ekfac
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert recorded["steps"][0]["hessian"]["index_cfg"]["moe_experts"] == GLOB
    assert ComputeConfig.from_yaml(run).moe_experts == GLOB
    assert f"--moe_experts '{GLOB}'" in summary.next_shell

    target = tmp_path / "scores" / "hessian" / "kfac"
    shutil.copytree(run, target)
    *_, command = summary.next_shell.replace("\\\n", " ").splitlines()
    program, subcommand, _, *words = shlex.split(command)
    assert (program, subcommand) == ("bergson", "ekfac")
    output = bergson.run_command([subcommand, tmp_path / "scores", *words])
    assert f"Skipping (already complete at {target})" in output
    assert (tmp_path / "scores" / "scores" / "scores.bin").stat().st_size


@pytest.mark.slow
def test_scores_are_those_with_bergsons_own_factors(mixtral, ekfac, tmp_path, record_property):
    data, queries = mixtral / "docs.jsonl", mixtral / "query.jsonl"
    options = {"extra": ["--moe_experts", GLOB], "token_batch_size": 128}
    own = bergson.ekfac_scores(tmp_path / "own", mixtral, data, queries, **options)
    shutil.copytree(ekfac[0], tmp_path / "given" / "hessian" / "kfac")
    given = bergson.ekfac_scores(tmp_path / "given", mixtral, data, queries, **options)
    record_property("error", error(given, own))
    assert error(given, own) < DAMPED_INVERSE


def test_a_torch_optimizer_of_fused_experts_is_refused(mixtral, tmp_path):
    """Its numbers stand for whole stacks of experts, which nobody cuts here."""
    state = {"state": {}, "param_groups": [{"params": [0]}]}
    torch.save(state, tmp_path / "optimizer.pt")
    for globs in (GLOB, None):
        with pytest.raises(CheckpointError, match="mixtral model's parameters isn't known") as e:
            ours(
                tmp_path / "run", mixtral, method="autocorrelation", projection_dim=4,
                optimizer_state=str(tmp_path / "optimizer.pt"), moe_experts=globs,
            )  # fmt: skip
        assert "\n" not in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["optimizer.pt"]


@pytest.mark.slow
def test_in_two_groups_of_modules(mixtral, ekfac, tmp_path):
    summary = ours(tmp_path / "run", mixtral, module_partitions=2, profile=True)
    assert summary.modules == ekfac[1].modules == 2 * (4 + 2 * 4)
    one, two = bergson.read(ekfac[0]), bergson.read(tmp_path / "run")
    for folder in set(one) - {"total_processed"}:
        for name, value in one[folder].items():
            np.testing.assert_array_equal(two[folder][name], value, err_msg=f"{folder} {name}")


@pytest.mark.slow
def test_two_processes(mixtral, ekfac, tmp_path: Path, record_property):
    """With four devices, weights spread over them, and the experts' own counts."""
    command = [
        str(tmp_path / "two"), f"--model={mixtral}", f"--dataset={mixtral / 'docs.jsonl'}",
        "--truncation", "--use_dataset_labels", f"--moe_experts={GLOB}", "--fsdp",
        "--num_shards=2", "--layout=bergson", "--token_batch_size=128",
    ]  # fmt: skip
    with Hosts(command, command) as hosts:
        (code, _, errors_0), (other, _, errors_1) = hosts.finish(300)
    assert (code, other) == (0, 0), errors_0 + errors_1
    one, two = bergson.read(ekfac[0]), bergson.read(tmp_path / "two")
    assert one["total_processed"] == two["total_processed"]
    for folder, worst in factor_errors(two, one).items():
        record_property(folder, worst)
        assert worst < INVARIANCE, folder
