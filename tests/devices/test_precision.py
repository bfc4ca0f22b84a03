"""Precisions of products: told to XLA, refused where untrue, and what they err by."""

import importlib
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.commands.compute.config import ComputeConfig
from jhessians.devices import precision
from jhessians.devices.precision import HIGHEST, MATMUL_PRECISIONS, multiplying, require_supported
from jhessians.errors import ConfigError
from tests import small

SPLIT = [name for name in MATMUL_PRECISIONS if name != HIGHEST]
BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.mark.parametrize("name", SPLIT)
def test_a_cpu_takes_none_that_it_would_compute_otherwise(name):
    with pytest.raises(ConfigError, match=f"{name} is not for a CPU, which has highest; give that"):
        require_supported(name, jax.devices()[0])


def test_messages_say_what_a_platform_has(monkeypatch):
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5e")
    with pytest.raises(ConfigError, match="tf32 is not for a TPU, which has highest, bf16_x6, bf1"):
        require_supported("tf32", tpu)
    with pytest.raises(ConfigError, match="no matmul precision 'tf'; give one of highest, "):
        require_supported("tf", tpu)
    monkeypatch.setattr(precision, "_compiles", lambda name, device: False)
    old = SimpleNamespace(platform="cuda", device_kind="Tesla T4")
    with pytest.raises(ConfigError, match="this GPU, Tesla T4, does not multiply in tf32_x3; give"):
        require_supported("tf32_x3", old)
    monkeypatch.setattr(precision, "_compiles", lambda name, device: True)
    require_supported("tf32_x3", old)


def test_a_device_is_asked_by_compiling():
    assert precision._compiles("BF16_BF16_F32", jax.devices()[0])
    assert not precision._compiles("TF32_TF32_F32", jax.devices()[0])


@pytest.mark.parametrize("option", [{"precision": "bf16"}, {"precision": "fp64"},
                                    {"precision": "fp32", "hessian_dtype": "fp64"}])  # fmt: skip
def test_only_float32_numbers_are_split(option):
    config = ComputeConfig(run_path="r", matmul_precision="bf16_x3", **option)
    with pytest.raises(ConfigError, match="bf16_x3 is for products of float32 numbers, not for --"):
        config.validate()
    ComputeConfig(run_path="r", **option).validate()


def test_choices_are_the_table():
    with pytest.raises(ConfigError, match="did you mean bf16_x3"):
        ComputeConfig(run_path="r", matmul_precision="bf16x3")
    ComputeConfig(run_path="r", matmul_precision="tf32", hessian_dtype="bf16").validate()


def lowered(name, platform, monkeypatch):
    """A whole step of a decoder's pass, as XLA for a platform is given it."""
    monkeypatch.setattr(precision, "require_supported", lambda name, device: None)
    model, (batch,) = small.decoder(layers=1), small.batches(small.documents([9, 5, 7]))
    loss = jhessians.NextTokenLoss("dataset")
    sites = jhessians.find_sites(loss, model, batch)
    problem = jhessians.Problem(loss, model, sites, matmul_precision=name)
    graph, state = nnx.split(model)

    def step(state, batch, statistics):
        here = problem.of(nnx.merge(graph, state))
        return jhessians.accumulate(jhessians.Covariance(), here, batch, statistics)

    statistics = jhessians.initialize(jhessians.Covariance(), problem)
    traced = jax.jit(step).trace(state, jax.tree.map(jnp.asarray, batch), statistics)
    return traced.lower(lowering_platforms=(platform,)).as_text()


TOLD = {
    "highest": "precision = [HIGHEST, HIGHEST]",
    "bf16": r"lhs_precision_type = bf16,.* num_primitive_operations = 1",
    "bf16_x3": r"lhs_precision_type = bf16,.* num_primitive_operations = 3",
    "bf16_x6": r"lhs_precision_type = bf16,.* num_primitive_operations = 6",
    "tf32": r"lhs_precision_type = tf32,.* num_primitive_operations = 1",
    "tf32_x3": r"lhs_precision_type = tf32,.* num_primitive_operations = 3",
}


@pytest.mark.parametrize(
    ("name", "platform"),
    [(name, {"gpu": "cuda"}.get(platform, platform))
     for name, each in MATMUL_PRECISIONS.items() for platform in each.platforms],
)  # fmt: skip
def test_every_product_of_a_pass_is_told(name, platform, monkeypatch):
    lines = lowered(name, platform, monkeypatch).splitlines()
    products = [line for line in lines if "dot_general" in line]
    assert len(products) > 20
    told = re.escape(TOLD[name]) if name == HIGHEST else TOLD[name]
    assert [line for line in products if not re.search(told, line)] == []


def test_a_pass_refuses_what_its_device_lacks():
    model, (batch,) = small.decoder(layers=1), small.batches(small.documents([9, 5, 7]))
    loss = jhessians.NextTokenLoss("dataset")
    sites = jhessians.find_sites(loss, model, batch)
    problem = jhessians.Problem(loss, model, sites, matmul_precision="tf32")
    with pytest.raises(ConfigError, match="tf32 is not for a CPU"):
        jhessians.run_pass(jhessians.Covariance(), problem, [batch])
    with pytest.raises(ConfigError, match="tf32 is not for a CPU"):
        with multiplying("tf32", jhessians.make_mesh(8)):
            pass


@pytest.fixture
def emulation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("emulation")


def test_parts_add_up(emulation):
    x = np.float32(np.random.default_rng(0).standard_normal(1000))
    three = [np.float64(part) for part in emulation.parts(jnp.asarray(x), 7, 3)]
    np.testing.assert_array_equal(sum(three), np.float64(x))
    two = [np.float64(part) for part in emulation.parts(jnp.asarray(x), 10, 2)]
    assert np.abs(sum(two) - x).max() <= 2.0**-22 * np.abs(x).max()


# Largest error of three typical products, against float64: of the parts alone, whatever the order
# in which a device sums. 1e-6 is what a float32 fit may err by: bf16_x3 exceeds it.
BOUNDS = {"bf16_x6": (0, 2e-8), "tf32_x3": (0, 2e-7), "bf16_x3": (1e-6, 1e-5),
          "tf32": (1e-6, 1e-3), "bf16": (1e-5, 1e-2)}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_emulated_errors(emulation, name):
    least, most = BOUNDS[name]
    benchmark = importlib.import_module("precision")

    def multiply(x, y):
        return np.float64(x).T @ np.float64(y)

    for _, x, y in islice(benchmark.operands(), 3):
        found = emulation.emulated_product(jnp.asarray(x), jnp.asarray(y), name, multiply)
        assert least < benchmark.largest(found, multiply(x, y)) < most


def test_the_emulation_has_as_many_products_as_the_table(emulation):
    for name in SPLIT:
        x, calls = jnp.ones((2, 2)), []
        emulation.emulated_product(x, x, name, lambda *pair, calls=calls: calls.append(pair) or 0)
        assert len(calls) == MATMUL_PRECISIONS[name].products
