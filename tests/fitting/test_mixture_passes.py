"""Passes over a mixture of experts: invariant as all others, and as cheap.

Most dimensions divide by neither 8 devices nor 6.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.capture.sites import restrict, unshared
from jhessians.fitting import passes
from jhessians.fitting.autocorrelation import fit_autocorrelations
from jhessians.folds.normalizers import AdamNormalizer
from jhessians.folds.rows import GradientRows
from jhessians.folds.shampoo import Shampoo
from jhessians.linalg.projection import Projection
from jhessians.models.config import ExpertsConfig, MLPConfig
from tests import small
from tests.fitting.test_compiled import Compilations, nbytes, product_shapes
from tests.small import relative_error
from tests.test_invariance import compare, fit, shuffled, widened
from tests.tolerances import INVARIANCE

LENGTHS = [5, 11, 2, 9, 16, 16, 1, 7, 13, 3, 8, 12, 6, 16, 4] * 3
EXPERTS, INSIDE = 5, 20
MIXTURE = ExpertsConfig(
    EXPERTS, 2, MLPConfig(INSIDE, "silu", "fused", bias=True), shared=MLPConfig(13, "silu")
)
UNEVEN = {"hidden_size": 42, "heads": 3, "key_value_heads": 3, "head_size": 14}
PLAIN = {"token_batch_size": 1024, "max_shapes": 1}


@pytest.fixture(scope="module")
def data():
    return small.documents(LENGTHS)


@pytest.fixture(scope="module")
def model():
    return small.decoder(**UNEVEN, layers=2, experts=MIXTURE)


@pytest.fixture(scope="module")
def reference(model, data):
    """One device, one batch, and float64: of an expert with few rows S errs by 6e-7 in float32
    already, so that two of them may differ by twice that.
    """
    with jax.enable_x64(True):
        graph, state = nnx.split(model)
        wide = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), state))
        method = jhessians.Covariance(jnp.float64)
        batches = small.batches(data, **PLAIN)
        return fit(wide, data, batches, method=method, dtype=jnp.float64)


def test_there_are_factors_of_every_expert(reference):
    experts = {name for name in reference["eigenvalue"] if name[-2:-1] == "."}
    assert experts == {
        f"layers.{layer}.mlp.{kind}.{expert}"
        for layer in range(2)
        for kind in ("gate_up", "down")
        for expert in range(EXPERTS)
    }
    # With a column of ones; and no expert is without rows here.
    assert reference["eigenvalue"]["layers.1.mlp.down.4"].shape == (42, INSIDE + 1)
    assert all(reference["eigenvalue"][name].any() for name in experts)


@pytest.mark.parametrize(
    ("devices", "fsdp", "rows"),
    [
        (8, False, 32),
        pytest.param(6, True, 512, marks=pytest.mark.slow),
        pytest.param(8, True, 128, marks=pytest.mark.slow),
        pytest.param(7, False, 64, marks=pytest.mark.slow),
    ],
)
def test_devices_batches_and_padding(reference, model, data, devices, fsdp, rows):
    """Other rows of a batch and other devices change which rows an expert's grid has."""
    batches = small.batches(data, token_batch_size=rows, max_shapes=1, devices=devices)
    batches = widened(shuffled(batches), 3)
    compare(fit(model, data, batches, devices=devices, fsdp=fsdp), reference)


@pytest.mark.slow
def test_small_batches_on_one_device(reference, model, data):
    """Of some batches, experts see nothing."""
    batches = small.batches(data, token_batch_size=16, max_shapes=2)
    assert len(batches) > 8
    compare(fit(model, data, batches), reference)


@pytest.mark.slow
def test_sampled_labels_on_devices(model, data):
    expected = fit(model, data, small.batches(data, **PLAIN), labels="sampled")
    batches = small.batches(data, token_batch_size=32, max_shapes=1, devices=8)
    compare(fit(model, data, batches, labels="sampled", devices=8, fsdp=True), expected)


@pytest.mark.slow
def test_the_unit_is_the_documents_rows_for_an_expert(model, data):
    whole = fit(model, data, small.batches(data, **PLAIN), method=Shampoo())
    batches = small.batches(data, token_batch_size=16, max_shapes=1, devices=8)
    compare(fit(model, data, batches, method=Shampoo(), devices=8), whole)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_some_experts_give_the_numbers_that_all_give(reference, model, data, devices):
    def chosen(name):
        return ".mlp." in name and (name.endswith(".3") or name == "layers.0.mlp.down.1")

    batches = small.batches(data, **PLAIN, devices=devices)
    loss = jhessians.NextTokenLoss("dataset")
    sites = restrict(jhessians.find_sites(loss, model, batches[0], include_bias=True), chosen)
    assert {site.name: site.members for site in sites.values()} == {
        "layers.{layer}.mlp.gate_up.{expert}": (3, 8),
        "layers.{layer}.mlp.down.{expert}": (1, 3, 8),
    }
    mesh = jhessians.make_mesh(devices) if devices > 1 else None
    part = jhessians.fit(
        jhessians.Problem(loss, model, sites, mesh=mesh), batches,
        positions=data.positions, documents=len(data),
    )  # fmt: skip
    names = {name for site in sites.values() for name in site.module_names()}
    assert set(part["eigenvalue"]) == names
    kept = {kind: {n: modules[n] for n in names} for kind, modules in reference.items()}
    compare(part, kept)


def random_normalizer(site):
    random = np.random.default_rng(len(site.name))
    shape = site.out_features, site.in_features
    return AdamNormalizer(random.random(shape).astype(np.float32) + 0.1, None)


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_autocorrelations_of_experts_on_devices(model, data, joint):
    """With the normalizers' rows spread over the devices, of one expert at a time."""

    def made(devices, rows):
        mesh = jhessians.make_mesh(devices) if devices > 1 else None
        batches = small.batches(data, token_batch_size=rows, max_shapes=1, devices=devices)
        loss = jhessians.NextTokenLoss("dataset")
        sites = unshared(
            jhessians.find_sites(
                loss, model, batches[0], select=lambda name: "gate_up" in name or ".down." in name
            )
        )
        normalizers = {
            name: random_normalizer(site) for site in sites.values() for name in site.module_names()
        }
        problem = jhessians.Problem(loss, model, sites, mesh=mesh)
        return fit_autocorrelations(
            problem, batches, GradientRows(Projection(4)), count=len(data), joint=joint,
            normalizers=normalizers,
        ).hessians  # fmt: skip

    expected, found = made(1, 1024), made(8, 32)
    assert len(expected) == (1 if joint else 2 * 2 * EXPERTS)
    for name, hessian in expected.items():
        assert relative_error(found[name], hessian) < 3 * INVARIANCE, name


def lowered(model, batch, fold=None):
    """A pass's step, lowered, and its statistics."""
    fold = fold or jhessians.Covariance()
    loss = jhessians.NextTokenLoss("dataset")
    sites = jhessians.find_sites(
        loss, model, batch, select=lambda name: ".mlp." in name and "shared" not in name
    )
    assert all(site.routed for site in sites.values())
    problem = jhessians.Problem(loss, model, sites)
    statistics = jhessians.initialize(fold, problem)
    graph, state = nnx.split(model)

    @partial(jax.jit, donate_argnums=2)
    def step(state, batch, statistics):
        here = problem.of(nnx.merge(graph, state))
        return jhessians.accumulate(fold, here, batch, statistics)

    return step.lower(state, batch, statistics), statistics


def test_experts_have_no_weight_gradients(model, data):
    (batch,) = small.batches(data, **PLAIN)
    weights = {(42, 2 * INSIDE), (2 * INSIDE, 42), (42, INSIDE), (INSIDE, 42)}
    text = lowered(model, batch)[0].as_text()
    assert not weights & set(product_shapes(text))
    # With them, the same search finds them.
    loss = jhessians.NextTokenLoss("dataset")
    graph, state = nnx.split(model)
    gradient = jax.jit(jax.grad(lambda s, b: loss(nnx.merge(graph, s), b)))
    params = jax.tree.map(lambda x: x, state)
    assert weights & set(product_shapes(gradient.lower(params, batch).as_text()))


def wide(experts):
    mlp = MLPConfig(64, "silu", "fused")
    return small.decoder(layers=6, hidden_size=64, experts=ExpertsConfig(experts, 2, mlp))


def test_sums_of_experts_are_updated_in_place():
    (batch,) = small.batches(small.documents([8, 6, 7]), **PLAIN)
    memory = {}
    for experts in (4, 16):
        step, statistics = lowered(wide(experts), batch)
        analysis = step.compile().memory_analysis()
        assert analysis.alias_size_in_bytes >= nbytes(statistics)
        # There is no second stack of factors, nor one of all of a layer's experts.
        memory[experts] = analysis.temp_size_in_bytes
        assert analysis.temp_size_in_bytes < nbytes(statistics) / 2, experts
    # Per expert, only the layer's weights (and their transposes) are held beside the sums.
    kernels = 12 * (64 * 128 + 64 * 64) * 4
    assert memory[16] - memory[4] < 3 * kernels, memory


@pytest.mark.slow
def test_grids_are_of_one_expert_at_a_time():
    """Memory for rows grows with the tokens, not with the tokens times the experts."""
    memory = {}
    for experts in (4, 32):
        for tokens in (64, 512):
            (batch,) = small.batches(small.documents([tokens // 4] * 4), token_batch_size=tokens)
            mixture = ExpertsConfig(experts, 2, MLPConfig(24, "silu", "fused"))
            model = small.decoder(layers=1, positions=128, experts=mixture)
            step, _ = lowered(model, batch)
            memory[experts, tokens] = step.compile().memory_analysis().temp_size_in_bytes
    few, many = (memory[experts, 512] - memory[experts, 64] for experts in (4, 32))
    assert many < 1.5 * few, memory


def test_routing_compiles_nothing_again(monkeypatch):
    """Batches of one shape that are routed in different ways; the sums are donated."""
    made = []

    def remember(*args, **options):
        made.append(jhessians.initialize(*args, **options))
        return made[-1]

    monkeypatch.setattr(passes, "initialize", remember)
    model = small.decoder(layers=1, experts=ExpertsConfig(4, 1, MLPConfig(8, "silu", "fused")))
    batches = [
        small.batches(small.documents([9, 5, 9], seed=seed), **PLAIN)[0] for seed in range(4)
    ]
    loss = jhessians.NextTokenLoss("dataset")
    sites = jhessians.find_sites(loss, model, batches[0])
    problem = jhessians.Problem(loss, model, sites)
    with Compilations() as compiled:
        sums = jhessians.run_pass(jhessians.Covariance(), problem, batches)
    assert compiled.count("step") == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(made[0]))
    # Every token's choice was counted once.
    routed = [np.asarray(s["terms"]) for s in sums.values() if "terms" in s]
    for counts in routed:
        assert (counts @ [256, 1]).sum() == 4 * (9 + 5 + 9 - 3)


@pytest.mark.slow
def test_counts_beyond_one_digit():
    """More positions than 256, and draws that count a third each."""
    mixture = ExpertsConfig(2, 1, MLPConfig(8, "silu", "fused"))
    model = small.decoder(layers=1, positions=512, experts=mixture)
    data = small.documents([310, 290])
    batches = small.batches(data, token_batch_size=1024, max_shapes=1) * 7
    sums = {}
    for draws in (1, 3):
        loss = jhessians.NextTokenLoss("sampled", seed=1, draws=draws)
        sites = jhessians.find_sites(loss, model, batches[0], select=lambda n: "gate_up" in n)
        problem = jhessians.Problem(loss, model, sites, draws=draws)
        sums[draws] = jhessians.run_pass(jhessians.Covariance(), problem, batches)
    ((name, counts),) = jhessians.folds.covariance.routed_terms(sums[1]).items()
    assert counts.sum() == 7 * data.positions and counts.dtype == np.int64
    np.testing.assert_array_equal(jhessians.folds.covariance.routed_terms(sums[3])[name], counts)
    for one, three in zip(sums[1][name]["activation"], sums[3][name]["activation"], strict=True):
        assert relative_error(three, one) < INVARIANCE
