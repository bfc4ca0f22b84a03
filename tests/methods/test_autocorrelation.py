"""Autocorrelation Hessians against torch bergson's in float64, and bergson using what we write."""

import dataclasses
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bergson import GradientProcessor as TheirProcessor
from flax import nnx
from transformers import Adafactor, AutoModelForCausalLM

from jhessians.capture.problem import Problem
from jhessians.capture.site import Site
from jhessians.capture.sites import find_sites, unshared
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.next_steps import next_steps
from jhessians.commands.compute.pipeline import compute
from jhessians.devices.mesh import make_mesh
from jhessians.errors import ConfigError
from jhessians.fitting.autocorrelation import fit_autocorrelations
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer
from jhessians.folds.rows import GradientRows
from jhessians.linalg.projection import Projection
from jhessians.methods import autocorrelation
from jhessians.methods.autocorrelation import _check_memory, split_sites
from jhessians.models.layers import Linear
from jhessians.models.loss import NextTokenLoss
from tests import small
from tests.oracles import bergson, checkpoints
from tests.tolerances import FACTORS, INVARIANCE

LENGTHS = (1, 2, 3, 20, 9, 25, 5, 41, 70)
SIZES = {
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2},
    "llama": {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1, "attention_bias": True,
    },
    "gpt2": {"n_embd": 16, "n_inner": 24, "n_head": 2},
}  # fmt: skip
HEADS = {"num_heads": 6, "head_size": 8}
QKV = ("h.0.attn.c_attn", "h.1.attn.c_attn")


@dataclass(frozen=True)
class Case:
    """A fit that both sides do.

    Attributes:
        family: Of the model.
        options: What both sides name alike.
        optimizer: Whose state normalises gradients.
        hessians: How many there must be.
    """

    family: str
    options: dict[str, Any]
    optimizer: str = ""
    hessians: int = 8


CASES = {
    "llama": Case("llama", {"projection_dim": 4, "loss_reduction": "mean"}, hessians=14),
    "llama with biases, normal, of unit rows, adafactor": Case(
        "llama",
        {
            "projection_dim": 4,
            "projection_type": "normal",
            "projection_scale": "row_norm",
            "projection_seed": 7,
            "include_bias": True,
        },
        optimizer="adafactor",
        hessians=14,
    ),  # fmt: skip
    "gpt_neox with biases, global": Case(
        "gpt_neox",
        {"projection_dim": 6, "projection_target": "global", "include_bias": True},
        hessians=1,
    ),
    "gpt_neox, normal and global, of unit rows": Case(
        "gpt_neox",
        {
            "projection_dim": 6,
            "projection_target": "global",
            "projection_type": "normal",
            "projection_scale": "row_norm",
        },
        hessians=1,
    ),  # fmt: skip
    "gpt2 whole": Case(
        "gpt2", {"filter_modules": "*.mlp.*,*.c_attn", "label_smoothing": 0.1}, hessians=2
    ),
    "gpt2 with biases, heads, adam": Case(
        "gpt2",
        {"projection_dim": 4, "include_bias": True, "split_attention_modules": QKV, **HEADS},
        optimizer="adam",
        hessians=6 + 12,
    ),
    "gpt2 heads": Case(
        "gpt2", {"projection_dim": 4, "split_attention_modules": QKV, **HEADS}, hessians=6 + 12
    ),
    "gpt2 tokens": Case("gpt2", {"projection_dim": 4, "attribute_tokens": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family, sizes in SIZES.items():
        checkpoints.build(family, root / family, seed=1, **sizes)
        checkpoints.corpus(root / family, 12, lengths=LENGTHS)
    return root


def optimizer_state(folder, kind):
    """What a training run leaves behind: second moments of random gradients."""
    file = folder / kind / "optimizer.pt"
    if file.exists():
        return str(file.parent)
    model = AutoModelForCausalLM.from_pretrained(folder)
    noise = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        shape = parameter.shape
        parameter.grad = torch.randn(shape, generator=noise) * torch.rand(shape, generator=noise)
    optimizer = (
        torch.optim.AdamW(model.parameters())
        if kind == "adam"
        else Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    )
    optimizer.step()
    file.parent.mkdir()
    torch.save(optimizer.state_dict(), file)
    return str(file.parent)


def ours(out, folder, **options):
    """Our run in `out`, on one device unless told otherwise."""
    given = {
        "model": str(folder), "dataset": str(folder / "docs.jsonl"), "truncation": True,
        "method": "autocorrelation", "token_batch_size": 256, "world_size": 1,
    }  # fmt: skip
    config = ComputeConfig(run_path=str(out), **given | options)
    return compute(config)


def theirs(folder, **options):
    """bergson's run in float64, in smaller batches."""
    include_bias = options.pop("include_bias", False)
    reduction = options.pop("loss_reduction", "sum")
    extra = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else [value]
        extra += [f"--{name}", *([] if value is True else map(str, values))]
    if "split_attention_modules" in options:
        extra += ["--head_dim", "2"]
    return bergson.fit(
        folder, folder / "docs.jsonl", method="autocorrelation", ev_correction=False,
        use_dataset_labels=False, include_bias=include_bias, loss_reduction=reduction, extra=extra,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted(models, tmp_path_factory):
    """Both sides' folders and our summary, made when first asked for."""
    done: dict[str, tuple[Path, Path, Any]] = {}

    def fit(name):
        if name not in done:
            case = CASES[name]
            folder, options = models / case.family, dict(case.options)
            if case.optimizer:
                options["optimizer_state"] = optimizer_state(folder, case.optimizer)
            out = tmp_path_factory.mktemp("runs") / "run"
            done[name] = out, theirs(folder, **options), ours(out, folder, **options)
        return done[name]

    return fit


def worst_error(found, expected):
    """Over all Hessians: the largest difference relative to the largest entry."""
    assert set(found) == set(expected)
    return max(small.relative_error(found[name], np.asarray(expected[name])) for name in expected)


@pytest.mark.parametrize("name", CASES)
def test_hessians_are_bergsons(fitted, record_property, name):
    out, reference, summary = fitted(name)
    case = CASES[name]
    expected, found = TheirProcessor.load(reference), TheirProcessor.load(out)
    assert len(found.hessians) == case.hessians
    error = worst_error(found.hessians, expected.hessians)
    record_property("error", error)
    assert error < FACTORS
    # Settings, eigenpairs and normalizers, as bergson itself reads them.
    found.check_projection_matches(expected, "bergson's")
    assert found.reshape_to_square == expected.reshape_to_square
    for module, (values, vectors) in found.hessians_eigen.items():
        hessian = found.hessians[module]
        assert hessian.dtype == values.dtype == vectors.dtype == torch.float32
        rebuilt = (vectors.double() * values.double()) @ vectors.double().T
        assert small.relative_error(rebuilt, hessian.double()) < FACTORS
        spectrum = expected.hessians_eigen[module][0]
        assert (values - spectrum).abs().max() < FACTORS * spectrum.max()
    # bergson keeps those of embeddings as well, and never uses them.
    modules = {name.partition(".head_")[0] for name in found.hessians}
    assert set(found.normalizers) == (modules if case.optimizer else set())
    for module, normalizer in found.normalizers.items():
        for field, moments in normalizer.state_dict().items():
            if field != "__class__":
                assert torch.equal(moments, getattr(expected.normalizers[module], field))
    positions = torch.load(reference / "total_processed.pt", weights_only=True)
    assert torch.equal(torch.load(out / "total_processed.pt", weights_only=True), positions)
    assert summary.positions == positions and summary.product == "Hessians"


def test_estimated_normalizers_do_what_an_optimizers_do(models, tmp_path):
    """bergson can't estimate them; it gets ours as an optimizer's state.

    Without biases: a key's bias has no gradient but rounding errors, which a normalizer that is
    estimated from them would make as large as everything else.
    """
    folder, run = models / "gpt_neox", tmp_path / "run"
    ours(run, folder, projection_dim=4, normalizer="adam", layout="bergson")
    processor = TheirProcessor.load(run)
    assert len(processor.normalizers) == 8
    state = {
        index: {"param_name": f"gpt_neox.{module}.weight", "exp_avg_sq": normalizer.weight_avg_sq}
        for index, (module, normalizer) in enumerate(processor.normalizers.items())
    }
    content = {"state": state, "param_groups": [{"params": list(state)}]}
    torch.save(content, tmp_path / "optimizer.pt")
    reference = theirs(folder, projection_dim=4, optimizer_state=str(tmp_path / "optimizer.pt"))
    expected = TheirProcessor.load(reference)
    assert worst_error(processor.hessians, expected.hessians) < FACTORS


def test_older_names_are_links_to_the_same_files(fitted):
    out = fitted("llama")[0]
    for name in ("hessians.pth", "hessians_eigen.pth"):
        older = out / name.replace("hessians", "preconditioners")
        assert os.path.samefile(out / name, older)
    older = (out / "processor_config.json").read_text()
    settings = {"projection_dim": 4, "reshape_to_square": False, "projection_type": "rademacher"}
    # What tells our matrices from those that a reader of the older file would otherwise assume.
    settings |= {"projection_scale": "jl", "projection_version": 2}
    assert json.loads(older) == settings
    assert not list(out.glob("*_sharded")) and not (out / "influence_results").exists()


def test_bergson_scores_with_it_as_the_summary_says(fitted, tmp_path, monkeypatch):
    """The commands, word for word, and the Python."""
    out, _, summary = fitted("gpt2 heads")
    for line in summary.next_shell.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        assert program == "bergson"
        bergson.run_command(words)
    scores = np.fromfile(f"{out}-scores/scores.bin", np.float32)
    assert len(scores) and np.isfinite(scores).all() and np.abs(scores).max() > 0
    namespace: dict[str, Any] = {}
    exec(summary.next_python, namespace)
    assert "GradientProcessor" in namespace


def test_commands_are_left_out_where_bergson_has_no_such_gradients():
    config = ComputeConfig(run_path="r", method="autocorrelation", normalizer="adam")
    shell, python = next_steps(config, model="m", dataset="d", shards=1)
    assert shell == "" and "GradientProcessor.load('r')" in python
    config = dataclasses.replace(config, normalizer="none", layout="influence_results")
    assert next_steps(config, model="m", dataset="d", shards=1) == ("", "")


DECODER = small.decoder(hidden_size=16)
DOCUMENTS = small.documents((9, 30, 2, 1, 17, 5, 23, 12, 3))


def random_normalizer(site, kind):
    random = np.random.default_rng(len(site.name))
    o, i = site.out_features, site.in_features
    moments = [random.random(shape).astype(np.float32) + 0.1 for shape in ((o, i), o, i, o)]
    bias = moments[3] if site.ones else None
    if kind == "adam":
        return AdamNormalizer(moments[0], bias)
    return AdafactorNormalizer(moments[1], moments[2], bias)


def in_memory(rows, *, joint=False, normalizer=None, devices=1, tokens=256):
    mesh = make_mesh(devices) if devices > 1 else None
    batches = small.batches(DOCUMENTS, token_batch_size=tokens, devices=devices)
    loss = NextTokenLoss(labels="dataset", reduction="mean_gradient")
    # Two linears of four, which are quicker to compile.
    sites = find_sites(
        loss, DECODER, batches[0], include_bias=True, select=lambda name: ".mlp." in name
    )
    problem = Problem(loss, DECODER, unshared(sites), mesh=mesh)
    normalizers = normalizer and {
        name: random_normalizer(site, normalizer)
        for site in sites.values()
        for name in site.module_names()
    }
    count = DOCUMENTS.positions if rows.tokens else len(DOCUMENTS)
    return fit_autocorrelations(
        problem, batches, rows, count=count, joint=joint, normalizers=normalizers
    )


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (GradientRows(Projection(3), split=("layers.{layer}.mlp.up",), heads=3),
         {"normalizer": "adam"}),
        (GradientRows(Projection(5), tokens=True), {"joint": True, "normalizer": "adafactor"}),
    ],
    ids=["per module, heads, adam", "global, tokens, adafactor"],
)  # fmt: skip
def test_batch_padding_and_devices_change_nothing(rows, options):
    expected = in_memory(rows, **options)
    found = in_memory(rows, devices=8, tokens=32, **options)
    assert len(expected.hessians) == (1 if "joint" in options else 2 * (3 + 1))
    assert worst_error(found.hessians, expected.hessians) < INVARIANCE
    for name, (values, _) in expected.eigen.items():
        assert np.abs(found.eigen[name].values - values).max() < INVARIANCE * values.max()


class TwoLinears(nnx.Module):
    """A regression on token numbers whose two losses are one and its double."""

    def __init__(self):
        self.first = Linear(1, 4, rngs=nnx.Rngs(0))
        self.second = Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, batch):
        x = jnp.asarray(batch.tokens, jnp.float32)[:, :, None] / 53
        squares = jnp.square(self.second(jnp.tanh(self.first(x)))).sum(2)
        return jnp.where(batch.position_mask, squares, 0).sum()


@pytest.mark.parametrize("joint", [False, True])
def test_the_grams_of_draws_are_averaged(joint):
    """(G + 4 G) / 2, which is not the Gram of the gradients' mean."""

    def fit(draws):
        def loss(model, batch):
            value = model(batch)
            return value if draws == 1 else jnp.stack([value, 2 * value])

        batches = small.batches(DOCUMENTS)
        model = TwoLinears()
        sites = unshared(find_sites(loss, model, batches[0]))
        problem = Problem(loss, model, sites, draws=draws)
        rows = GradientRows(Projection(2))
        return fit_autocorrelations(problem, batches, rows, count=len(DOCUMENTS), joint=joint)

    one, two = fit(1).hessians, fit(2).hessians
    assert set(one) == ({"joint"} if joint else {"first", "second"})
    for name, hessian in one.items():
        assert small.relative_error(two[name], 2.5 * hessian) < INVARIANCE


def qkv(**changes):
    site = Site(
        "h.{layer}.attn.c_attn", 16, 48, use_bias=True, stack=(("layer", 2),), members=(0, 1)
    )
    return {site.name: dataclasses.replace(site, **changes)}


@pytest.mark.parametrize(
    ("names", "sizes", "words"),
    [
        (QKV, {"num_heads": 5, "head_size": 8}, "5 x --head_size 8 is 40, but h.0.attn.c_attn has"),
        (QKV[:1], HEADS, "takes h.0.attn.c_attn but not h.1.attn.c_attn"),
    ],
)
def test_heads_that_cannot_be(names, sizes, words):
    config = ComputeConfig(
        run_path="r", method="autocorrelation", split_attention_modules=names, **sizes
    )
    with pytest.raises(ConfigError, match=words.replace("(", ".")) as caught:
        split_sites(config, qkv())
    assert "\n" not in str(caught.value)


def test_a_module_to_split_that_is_not_there(models, tmp_path):
    with pytest.raises(ConfigError, match="matches none of 8 modules; did you mean h.0.attn"):
        ours(
            tmp_path / "run", models / "gpt2",
            split_attention_modules=("h.0.attn.c_atn",), **HEADS,
        )  # fmt: skip


def test_large_grams_are_announced(monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 50}
    monkeypatch.setattr(os, "sysconf", pages.get)
    config = ComputeConfig(run_path="r", method="autocorrelation")
    said: list[str] = []
    run = SimpleNamespace(
        options=config, dtype=np.dtype(np.float32), progress=SimpleNamespace(warn=said.append)
    )
    _check_memory(run, qkv())
    assert not said
    _check_memory(run, qkv(in_features=4096, out_features=4096))
    assert "give --projection_dim, such as 16" in said[0] and len(said) == 1


def test_grams_beyond_the_hosts_memory_are_refused(models, tmp_path, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}
    size = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: pages.get(name) or size(name))
    monkeypatch.setattr(autocorrelation, "LARGE_BYTES", 1)
    with pytest.raises(ConfigError, match=r"eigenvectors take .*, but this host has 41\S* kB"):
        ours(tmp_path / "run", models / "llama")
    assert not list(tmp_path.iterdir())
