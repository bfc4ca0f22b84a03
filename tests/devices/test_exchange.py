"""Matrices go to the hosts that work on them and come back, and nothing goes anywhere else."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.devices.exchange import (
    doors,
    from_hosts,
    mesh_of_rows,
    rows_to_first,
    to_hosts,
)

ROWS, COLUMNS = 24, 13
HOSTS = {
    "four": [0, 0, 1, 1, 2, 2, 3, 3],
    "interleaved": [0, 1, 2, 3, 0, 1, 2, 3],
    "unequal": [0, 0, 0, 1, 1, 2, 2, 2],  # the third devices of two hosts pass nothing on
}


@pytest.fixture(params=[(8,), (4, 2)], ids=str)
def mesh(request):
    names = ("x", "y")[: len(request.param)]
    return jax.make_mesh(request.param, names, axis_types=(AxisType.Auto,) * len(names))


def placed(mesh, whole):
    """An array whose rows are spread over the devices."""
    return jax.device_put(whole, NamedSharding(mesh, P(mesh.axis_names)))


def matrices(count):
    return np.random.default_rng(0).standard_normal((count, ROWS, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize("hosts", HOSTS)
def test_each_host_gets_its_matrix(mesh, hosts):
    chosen = doors(HOSTS[hosts])
    wanted = matrices(len(chosen))
    pieces = to_hosts(tuple(placed(mesh, x) for x in wanted), mesh=mesh, doors=chosen)
    for numbers, expected in zip(chosen, wanted, strict=True):
        found = np.concatenate([np.asarray(pieces[number]) for number in numbers], axis=1)
        np.testing.assert_array_equal(found[:, :COLUMNS], expected)
    (back,) = {  # what the hosts give is spread as it was before
        tuple(np.asarray(x).tobytes() for x in from_hosts(
            pieces, columns=COLUMNS, mesh=mesh, doors=chosen))
    }  # fmt: skip
    assert back == tuple(x.tobytes() for x in wanted)


@pytest.mark.parametrize("start, stop", [(0, 24), (0, 1), (4, 19), (2, 3), (23, 24)])
@pytest.mark.parametrize("hosts", ["four", "interleaved"])
def test_the_first_host_gets_rows(mesh, hosts, start, stop):
    chosen, (whole,) = doors(HOSTS[hosts]), matrices(1)
    pieces = rows_to_first(placed(mesh, whole), mesh=mesh, doors=chosen, start=start, stop=stop)
    first = np.concatenate(
        [np.asarray(pieces[number]).reshape(-1, COLUMNS) for number in chosen[0]]
    )
    assert {row.tobytes() for row in whole[start:stop]} <= {row.tobytes() for row in first}
    others = np.delete(np.asarray(pieces), chosen[0], axis=0)
    assert not others.any() and len(others) == 6


def moved(compiled) -> dict[str, int]:
    """Collective operation → numbers that a device gets in it."""
    found: dict[str, int] = {}
    pattern = r"= (.*) (all-[a-z-]+|collective-permute|reduce-scatter)\("
    for result, kind in re.findall(pattern, compiled.as_text()):
        shapes = re.findall(r"f32\[([\d,]+)\]", result)
        numbers = sum(math.prod(map(int, shape.split(","))) for shape in shapes)
        found[kind] = found.get(kind, 0) + numbers
    return found


def test_nothing_is_gathered(mesh):
    """Compiled for 4 hosts: a device passes on its rows of each host's matrix, and no more."""
    chosen = doors(HOSTS["four"])
    arrays = tuple(placed(mesh, np.zeros((64, 32), np.float32)) for _ in range(4))
    compiled = to_hosts.lower(arrays, mesh=mesh, doors=chosen).compile()
    # One matrix comes through two devices, each of which gets half of it, and gives as much back.
    assert moved(compiled) == {"all-to-all": 64 * 32 // 2}, compiled.as_text()
    pieces = to_hosts(arrays, mesh=mesh, doors=chosen)
    back = from_hosts.lower(pieces, columns=32, mesh=mesh, doors=chosen).compile()
    assert moved(back) == {"all-to-all": 64 * 32 // 2}, back.as_text()
    rows = rows_to_first.lower(arrays[0], mesh=mesh, doors=chosen, start=3, stop=40).compile()
    # 5 devices have some of these rows, which come through two doors: in three turns.
    assert moved(rows) == {"collective-permute": 3 * 8 * 32}, rows.as_text()


def test_only_spread_rows_are_moved(mesh):
    whole = np.zeros((ROWS, COLUMNS), np.float32)
    assert mesh_of_rows(placed(mesh, whole), axis=0) == mesh
    assert mesh_of_rows(jax.device_put(whole, NamedSharding(mesh, P())), axis=0) is None
    assert mesh_of_rows(jax.numpy.asarray(whole), axis=0) is None
    spread = NamedSharding(mesh, P(None, mesh.axis_names))
    stack = jax.device_put(np.zeros((2, ROWS, 3), np.float32), spread)
    assert mesh_of_rows(stack, axis=1) == mesh and mesh_of_rows(stack, axis=0) is None
