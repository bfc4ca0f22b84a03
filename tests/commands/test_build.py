"""Stores of gradients against `bergson build` in float64, and what must not change them."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from bergson import load_gradient_dataset
from bergson.data import TokenGradients, load_gradients
from bergson.gradients import GradientProcessor as TheirProcessor
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from jhessians.cli.main import main
from jhessians.commands.build import rows as build_rows
from jhessians.commands.table import COMMANDS
from jhessians.config.option import options_of
from jhessians.interop.gradient_store import GradientStore
from jhessians.interop.low_rank_store import LowRankStore
from tests.oracles import bergson, checkpoints
from tests.small import relative_error
from tests.tolerances import FACTORS, INVARIANCE, NORMAL_ENTRIES

SAME = 1e-10  # float64 on both sides: only the order of additions differs
LENGTHS = (1, 2, 3, 20, 9, 25, 5, 41, 70)
SIZES = {
    "llama": {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1, "attention_bias": True,
    },
    "gpt2": {"n_embd": 16, "n_inner": 24, "n_head": 2},
}  # fmt: skip
QKV = ("h.0.attn.c_attn", "h.1.attn.c_attn")
HEADS = {"split_attention_modules": QKV, "num_heads": 6, "head_size": 8}
NORMAL = {"projection_type": "normal", "projection_scale": "row_norm", "projection_seed": 7}


@dataclass(frozen=True)
class Case:
    """A store that both sides build.

    Attributes:
        family: Of the model.
        options: What both sides name alike.
        tolerance: On the largest difference.
        keys: How many names the columns must have.
    """

    family: str
    options: dict[str, Any]
    tolerance: float = SAME
    keys: int = 8


# Llama's norms are computed in float32 by transformers, in float64 runs too.
CASES = {
    "gpt2": Case("gpt2", {}),
    "gpt2 with biases, mean": Case("gpt2", {"include_bias": True, "loss_reduction": "mean"}),
    "gpt2 projected": Case("gpt2", {"projection_dim": 4}),
    "gpt2 projected with biases": Case("gpt2", {"projection_dim": 4, "include_bias": True}),
    "gpt2 normal, of unit rows": Case("gpt2", {"projection_dim": 4, **NORMAL}, NORMAL_ENTRIES),
    "gpt2 global": Case("gpt2", {"projection_dim": 9, "projection_target": "global"}, keys=1),
    "gpt2 heads": Case("gpt2", {**HEADS, "include_bias": True}, keys=6 + 12),
    "gpt2 heads projected": Case("gpt2", {**HEADS, "projection_dim": 3}, keys=6 + 12),
    "gpt2 of unit length": Case("gpt2", {"unit_normalize": True}),
    "gpt2 some, smoothed": Case(
        "gpt2", {"filter_modules": "*.mlp.*", "label_smoothing": 0.1}, keys=4
    ),
    "gpt2 log-odds": Case("gpt2", {"loss_fn": "log_odds"}, 1e-5),  # theirs are float32's
    "gpt2 tokens": Case("gpt2", {"attribute_tokens": True, "filter_modules": "*.mlp.*"}, keys=4),
    "gpt2 tokens projected": Case(
        "gpt2", {"attribute_tokens": True, "projection_dim": 3, "include_bias": True}
    ),
    "gpt2 tokens global": Case(
        "gpt2",
        {"attribute_tokens": True, "projection_dim": 5, "projection_target": "global"},
        keys=1,
    ),
    "gpt2 tokens of unit length": Case(
        "gpt2", {"attribute_tokens": True, "projection_dim": 3, "unit_normalize": True}
    ),
    "llama": Case("llama", {}, FACTORS, keys=14),
    "llama projected with biases": Case(
        "llama", {"projection_dim": 4, "include_bias": True}, FACTORS, keys=14
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family, sizes in SIZES.items():
        checkpoints.build(family, root / family, seed=1, **sizes)
        checkpoints.corpus(root / family, 12, lengths=LENGTHS)
    return root


def flags(options):
    """The same as the command line has them."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else [value]
        words += [f"--{name}", *(str(each) for each in values)]
    return words


def ours(out, folder, **options):
    """Our store, in float64 and on one device unless told otherwise."""
    given = {
        "model": folder, "dataset": folder / "docs.jsonl", "truncation": True, "quiet": True,
        "precision": "fp64", "token_batch_size": 128, "world_size": 1,
    }  # fmt: skip
    assert main(["build", str(out), *flags(given | options)]) == 0
    return out


def theirs(folder, **options):
    if "split_attention_modules" in options:
        options |= {"head_dim": 2}
    return bergson.build(folder, folder / "docs.jsonl", **options)


def aligned(store, like):
    """A store's matrix with its columns in the order of another's."""
    return np.concatenate([store.module(name) for name in like.sizes], axis=1)


@pytest.mark.parametrize("name", CASES)
def test_a_store_is_bergsons(models, tmp_path, record_property, name):
    case = CASES[name]
    folder = models / case.family
    found = GradientStore(ours(tmp_path / "run", folder, **case.options))
    reference = theirs(folder, **case.options)
    expected = GradientStore(reference)
    assert len(expected.sizes) == case.keys
    assert list(found.sizes.items()) == list(expected.sizes.items())
    assert found.dtype == expected.dtype == np.float64
    error = relative_error(found.matrix, expected.matrix)
    record_property("error", error)
    assert error < case.tolerance
    lengths = np.array([len(x) for x in checkpoints.encode(folder, folder / "docs.jsonl",
                                                          max_length=128)])  # fmt: skip
    assert (lengths < 2).any()
    if "attribute_tokens" in case.options:
        assert np.array_equal(found.offsets, expected.offsets)
        assert np.array_equal(np.diff(found.offsets), np.maximum(lengths - 1, 0))
        assert np.abs(found.matrix).sum(1).min() > 0
    else:
        # Documents that predict nothing have rows of zeros.
        assert np.array_equal(np.abs(found.matrix).sum(1) == 0, lengths < 2)
    for file in ("info.json", "processor_config.yaml"):
        assert (tmp_path / "run" / file).read_text() == (reference / file).read_text()


def test_bergsons_readers_take_our_folder(models, tmp_path):
    out = ours(tmp_path / "run", models / "gpt2", projection_dim=3, include_bias=True)
    data = load_gradient_dataset(out)
    assert set(data.column_names) == {"input_ids", "length", "gradients"}
    expected = checkpoints.encode(models / "gpt2", models / "gpt2" / "docs.jsonl", max_length=128)
    assert data["input_ids"][:] == expected
    assert np.allclose(data["gradients"], load_gradients(out))
    processor = TheirProcessor.load(out)
    assert processor.projection_dim == 3 and processor.include_bias
    assert int(torch.load(out / "total_processed.pt")) == sum(len(x) - 1 for x in expected)
    tokens = ours(tmp_path / "tokens", models / "gpt2", projection_dim=3, attribute_tokens=True)
    theirs = TokenGradients(tokens)
    assert len(theirs) == 12 and [len(theirs[n]) for n in range(12)] == [
        len(x) - 1 for x in expected
    ]
    step = yaml.safe_load((out / "config.yaml").read_text())["steps"][0]["build"]
    assert step["index_cfg"]["projection_dim"] == 3
    assert step["preprocess_cfg"] == {"unit_normalize": False, "aggregation": "none"}


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_aggregates_are_those_of_the_rows(models, tmp_path, how, unit):
    """bergson adds up in float32; the rows' own sum in float64 is the better truth."""
    options = {"projection_dim": 4, "unit_normalize": True} if unit else {"projection_dim": 4}
    folder = models / "gpt2"
    reference = GradientStore(theirs(folder, aggregation=how, **options))
    out = ours(tmp_path / "run", folder, aggregation=how, **options)
    found = GradientStore(out)
    assert found.sizes == reference.sizes and found.rows == 1 and found.dtype == np.float32
    assert (out / "info.json").read_text() == (
        theirs(folder, aggregation=how, **options) / "info.json"
    ).read_text()
    assert relative_error(found.matrix, reference.matrix) < FACTORS
    assert load_gradient_dataset(out)["query_index"][:] == [0]
    rows = GradientStore(theirs(folder, **options)).matrix
    wide = GradientStore(
        ours(tmp_path / "wide", folder, aggregation=how, store_dtype="fp64", **options)
    )
    expected = rows.sum(0, keepdims=True) / (len(rows) if how == "mean" else 1)
    assert relative_error(wide.matrix, expected) < SAME


@pytest.mark.parametrize(
    "options",
    [{}, {"projection_dim": 4, "attribute_tokens": True},
     {"projection_dim": 9, "projection_target": "global"}, {"rank": 3}],
    ids=["whole", "tokens", "global", "rank"],
)  # fmt: skip
def test_devices_and_batches_change_nothing(models, tmp_path, options):
    folder = models / "gpt2"
    stores = []
    for number, where in enumerate(
        [
            {"world_size": 1, "token_batch_size": 512},
            {"world_size": 8, "token_batch_size": 128},
            {"world_size": 7, "token_batch_size": 128, "max_batch_size": 1},
            {"world_size": 2, "activations": "recompute", "fsdp": True},
        ]
    ):
        out = ours(tmp_path / str(number), folder, precision="fp32", **options | where)
        if "rank" in options:
            store = LowRankStore(out)
            pairs = [store.factors(name) for name in store.shapes]
            stores.append(np.concatenate(
                [np.einsum("nro,nri->noi", g, a).reshape(len(g), -1) for g, a in pairs], axis=1
            ))  # fmt: skip
        else:
            stores.append(GradientStore(out).matrix)
    for other in stores[1:]:
        # A truncated decomposition moves more where two singular values are close.
        limit = 100 * INVARIANCE if "rank" in options else 10 * INVARIANCE
        assert relative_error(other, stores[0]) < limit


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_other_number_formats_are_roundings(models, tmp_path, dtype):
    whole = GradientStore(ours(tmp_path / "whole", models / "gpt2", projection_dim=4))
    found = GradientStore(
        ours(tmp_path / "run", models / "gpt2", projection_dim=4, store_dtype=dtype)
    )
    assert np.array_equal(found.matrix, whole.matrix.astype(found.dtype))
    assert np.array_equal(load_gradients(tmp_path / "run"), found.matrix)


@pytest.mark.parametrize("options", [{}, {"include_bias": True, **HEADS}], ids=["", "heads"])
def test_outer_products_are_the_truncated_decomposition(models, tmp_path, capsys, options):
    rank = 3
    whole = GradientStore(ours(tmp_path / "whole", models / "gpt2", **options))
    words = {"rank": rank, "quiet": False, **options}
    store = LowRankStore(ours(tmp_path / "run", models / "gpt2", **words))
    assert list(store.shapes) == list(whole.sizes) and store.rows == whole.rows
    lost = square = 0.0
    for name, (o, i) in store.shapes.items():
        gradients = whole.module(name).reshape(-1, o, i)
        g, a = store.factors(name)
        found = np.einsum("nro,nri->noi", g, a)
        u, s, v = np.linalg.svd(gradients, full_matrices=False)
        best = np.einsum("nor,nr,nri->noi", u[..., :rank], s[:, :rank], v[:, :rank])
        assert relative_error(found, best) < SAME
        square, lost = square + (s**2).sum(), lost + (s[:, rank:] ** 2).sum()
        some = store.factors(name, slice(2, 4))
        assert np.array_equal(some[0], g[2:4]) and np.array_equal(some[1], a[2:4])
    assert 0.001 < lost / square < 0.9
    assert f"{lost / square:.2%} of the squared norm, beyond rank 3" in capsys.readouterr().out


def test_enough_outer_products_lose_nothing(models, tmp_path, capsys):
    whole = GradientStore(ours(tmp_path / "whole", models / "gpt2", unit_normalize=True))
    words = {"rank": 60, "unit_normalize": True, "quiet": False}
    store = LowRankStore(ours(tmp_path / "run", models / "gpt2", **words))
    for name in store.shapes:
        g, a = store.factors(name)
        found = np.einsum("nro,nri->noi", g, a).reshape(len(g), -1)
        assert relative_error(found, whole.module(name)) < SAME
    assert "0.00% of the squared norm" in capsys.readouterr().out


def optimizer_state(folder):
    """What a training run leaves behind: second moments of random gradients."""
    file = folder / "adam" / "optimizer.pt"
    if not file.exists():
        model = AutoModelForCausalLM.from_pretrained(folder)
        noise = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=noise)
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        file.parent.mkdir()
        torch.save(optimizer.state_dict(), file)
    return str(file.parent)


def test_normalizers_of_an_optimizer_are_bergsons(models, tmp_path):
    folder = models / "gpt2"
    options = {"projection_dim": 4, "include_bias": True,
               "optimizer_state": optimizer_state(folder)}  # fmt: skip
    found = GradientStore(ours(tmp_path / "run", folder, **options))
    expected = GradientStore(theirs(folder, **options))
    assert relative_error(found.matrix, expected.matrix) < FACTORS  # their divisors are float32
    names = set(TheirProcessor.load(theirs(folder, **options)).normalizers)
    # bergson keeps those of embeddings too, which it never reads.
    assert names - {"wte", "wpe"} == set(TheirProcessor.load(tmp_path / "run").normalizers)


def test_a_processors_normalizers_and_projection_are_taken(models, tmp_path, capsys):
    folder = models / "gpt2"
    options = {"projection_dim": 4, "include_bias": True, "normalizer": "adafactor"}
    shared = {
        "model": folder, "dataset": folder / "docs.jsonl", "truncation": True, "quiet": True,
        "precision": "fp64", "world_size": 1,
    }  # fmt: skip
    run = tmp_path / "hessian"
    given = shared | options | {"method": "autocorrelation", "hessian_dtype": "fp64"}
    assert main(["compute", str(run), *flags(given)]) == 0
    estimated = GradientStore(ours(tmp_path / "estimated", folder, **options))
    taken = ours(tmp_path / "taken", folder, processor_path=run)
    assert relative_error(GradientStore(taken).matrix, estimated.matrix) < FACTORS
    # The Gram of the rows is the Hessian.
    hessians = TheirProcessor.load(run).hessians
    for name, hessian in hessians.items():
        rows = estimated.module(name)
        assert relative_error(rows.T @ rows / len(rows), np.asarray(hessian)) < FACTORS
    capsys.readouterr()
    assert main(["build", str(tmp_path / "x"), *flags(shared), "--processor_path", str(run),
                 "--projection_dim", "5"]) == 2  # fmt: skip
    assert "--projection_dim 5 contradicts" in capsys.readouterr().err


def test_a_run_replays(models, tmp_path):
    out = ours(tmp_path / "run", models / "gpt2", projection_dim=4, unit_normalize=True)
    again = tmp_path / "again"
    assert main(["build", str(again), "--config", str(out), "--quiet"]) == 0
    for file in ("gradients.bin", "info.json", "processor_config.yaml"):
        assert (again / file).read_bytes() == (out / file).read_bytes()
    assert main(["compute", str(tmp_path / "x"), "--config", str(out)]) == 2


def test_the_demo_needs_no_options(tmp_path, capsys):
    words = ["--projection_dim", "2", "--max_tokens", "300", "--world_size", "1"]
    assert main(["build", str(tmp_path / "run"), *words]) == 0
    captured = capsys.readouterr()
    assert "projected gradients are in" in captured.out and "are free" in captured.err
    namespace: dict[str, Any] = {}
    code = captured.out.split("Or load them in Python\n")[1]
    exec("\n".join(line.strip() for line in code.splitlines()), namespace)  # noqa: S102
    info = json.loads((Path(tmp_path) / "run" / "info.json").read_text())
    assert info["base_dtype"] == "float32" and info["num_grads"] == info["num_items"]


def only_error(capsys):
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("jhessians: error")]
    assert captured.out == "" and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--aggregation", "mean", "--attribute_tokens"], "wants one of every token"),
        (["--rank", "2", "--projection_dim", "4"], "--projection_dim makes rows that are short"),
        (["--rank", "2", "--attribute_tokens"], "--attribute_tokens makes rows of rank one"),
        (["--rank", "2", "--aggregation", "sum"], "--aggregation adds up documents"),
        (["--rank", "2", "--normalizer", "adam"], "--normalizer adam scales every entry"),
        (["--rank", "-1"], "--rank must be at least 0"),
        (["--projection_seed", "3"], "says nothing without a projection"),
        (["--projection_target", "global"], "says nothing without a projection"),
        (["--processor_path", "p", "--normalizer", "adam"], "--processor_path has its own"),
        (["--attribute_tokens", "--moe_experts", "*"], "an expert of --moe_experts reads only"),
        (["--store_dtype", "float32"], "'float32' is not one of fp32"),
        (["--precision", "fp64", "--matmul_precision", "tf32"], "is for products of float32"),
        (["--store_dtype", "fp64", "--matmul_precision", "tf32"], "is for products of float32"),
        (["--model", "m"], "--model is given without --dataset"),
        (["--fisher_type", "sampled"], "unknown option --fisher_type"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, words, message):
    assert main(["build", str(tmp_path / "out" / "x"), *words]) == 2
    assert message in only_error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_the_work(models, tmp_path, capsys, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    flags_ = flags({"model": models / "gpt2", "dataset": models / "gpt2" / "docs.jsonl",
                    "truncation": True, "world_size": 1})  # fmt: skip
    assert main(["build", str(tmp_path / "out" / "x"), *flags_]) == 1
    line = only_error(capsys)
    assert "12 rows of 3,584 fp32 numbers take 172.0 kB, where 1.0 kB are free" in line
    assert "--projection_dim, --rank or --store_dtype bf16" in line
    assert not list((tmp_path / "out").iterdir())


def test_memory_bounds_the_documents_of_a_batch(models, tmp_path, capsys, monkeypatch):
    """Rows are made one document at a time where memory holds no more, or refused."""
    folder = models / "gpt2"
    plenty = GradientStore(ours(tmp_path / "plenty", folder)).matrix
    seen = []
    real = build_rows.plan_batches

    def spy(*args, **options):
        seen.append(options["max_documents"])
        return real(*args, **options)

    monkeypatch.setattr(build_rows, "plan_batches", spy)
    monkeypatch.setattr(build_rows, "free_memory", lambda: 8 * 2 * 3584 * 8)
    scarce = GradientStore(ours(tmp_path / "scarce", folder)).matrix
    assert seen == [2] and relative_error(scarce, plenty) < SAME
    monkeypatch.setattr(build_rows, "free_memory", lambda: 3584 * 8)
    given = flags({"model": folder, "dataset": folder / "docs.jsonl", "truncation": True,
                   "precision": "fp64", "world_size": 1})  # fmt: skip
    assert main(["build", str(tmp_path / "out" / "x"), *given]) == 2
    assert "the gradients of a document take 28.7 kB, but" in only_error(capsys)


def test_gradients_beyond_the_format_are_cut_with_a_warning(models, tmp_path, capsys):
    changed = tmp_path / "model"
    shutil.copytree(models / "gpt2", changed)
    file = changed / "model.safetensors"
    tensors = load_file(file)
    for name in ("transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias"):
        tensors[name] = tensors[name] * np.float32(1e6)
    tensors["transformer.h.0.attn.c_attn.weight"] = tensors[
        "transformer.h.0.attn.c_attn.weight"
    ] / np.float32(1e6)
    save_file(tensors, file, metadata={"format": "pt"})
    out = ours(tmp_path / "run", changed, precision="fp32", store_dtype="fp16", quiet=False)
    assert "beyond the range of fp16 were cut" in " ".join(capsys.readouterr().out.split())
    found = GradientStore(out).module("h.0.attn.c_attn")
    assert np.isfinite(found).all() and np.abs(found).max() == np.finfo(np.float16).max


def test_help_imports_no_jax():
    code = (
        "import sys; from jhessians.cli.main import main; "
        "assert main(['build', '--help']) == main(['apply', '--help']) == 0; "
        "assert 'jax' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    for command in ("build", "apply"):
        for each in options_of(COMMANDS[command].config):
            assert f"  --{each.name} " in done.stdout
        assert "statistics of --method" not in done.stdout
