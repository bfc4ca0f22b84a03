"""Which axes a mesh has: asked for, or chosen."""

import math

import jax
import pytest

import jhessians
from jhessians.devices.axes import LONGEST_AXIS, parse_axes, short_factors
from jhessians.errors import MeshError


def test_axes_are_written_as_sizes_or_with_names():
    assert parse_axes("8") == {"devices0": 8}
    assert parse_axes("4x2") == {"devices0": 4, "devices1": 2}
    assert parse_axes("data=4, fsdp=2") == {"data": 4, "fsdp": 2}
    assert parse_axes("fsdp=4x2,data=3") == {"fsdp0": 4, "fsdp1": 2, "data": 3}


@pytest.mark.parametrize(
    "text", ["", "x", "4x", "0x2", "-1", "4,2", "model=8", "data=", "data=2,4"]
)
def test_other_words_are_refused(text):
    with pytest.raises(MeshError, match="expected sizes such as 4x2, or names"):
        parse_axes(text)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 12, 16, 60, 256, 11, 22, 512])
def test_factors_are_short_where_divisors_allow(count):
    factors = short_factors(count)
    assert math.prod(factors) == count and 1 not in factors
    primes = [p for p in (11,) if count % p == 0]
    assert max(factors, default=1) <= max([LONGEST_AXIS, *primes])


def test_axes_are_made():
    mesh = jhessians.make_mesh(axes="data=2,fsdp=4")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    assert list(mesh.devices.flat) == jax.devices()
    assert dict(jhessians.make_mesh(6, axes="3x2").shape) == {"devices0": 3, "devices1": 2}
    assert jhessians.make_mesh(3).size == 3


@pytest.mark.parametrize(
    ("world_size", "axes", "words"),
    [
        (
            None,
            "4x3",
            "`mesh` 4x3 is of 12 devices, but there are 8; give sizes that multiply to 8$",
        ),
        (None, "2x2", "there are 8; give sizes that multiply to 8, or `world_size` 4$"),
        (4, "4x2", "`world_size` is 4; give sizes that multiply to 4$"),
        (9, None, "`world_size` asks for 9 devices, but JAX sees 8"),
    ],
)
def test_a_mesh_that_does_not_multiply_out_is_refused(world_size, axes, words):
    with pytest.raises(MeshError, match=words):
        jhessians.make_mesh(world_size, axes=axes)


@pytest.mark.parametrize("name", ["v5e:4x4x", "v9:2x2", "h100:8", "v5e"])
def test_topologies_that_do_not_exist_are_refused(name):
    with pytest.raises(MeshError, match=f"there is no TPU topology '{name}'.*such as v5e:4x4"):
        jhessians.topology_devices(name)
