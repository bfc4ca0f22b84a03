"""Projection matrices: bit for bit torch bergson's, wherever and in whatever pieces they are made.

bergson's own generator on CPU is the oracle, and of the generator itself a published vector.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bergson.collector import collector as bergson_collector
from bergson.collector.projection_matrix import random_matrix

from jhessians.linalg import projection as module
from jhessians.linalg.projection import (
    Projection,
    global_chunks,
    philox4x32,
    project_global,
    projection_key,
    random_entries,
)
from tests.small import relative_error
from tests.tolerances import FACTORS, NORMAL_ENTRIES

KINDS = ("rademacher", "normal")


def test_the_generators_published_vector():
    """Counter and key zero, from the Random123 distribution's known answers."""
    zero = jnp.zeros((1,), jnp.uint32)
    words = philox4x32(zero, zero, jnp.zeros((2,), jnp.uint32))
    expected = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert tuple(int(word[0]) for word in words) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16, 64), (17, 129), (1, 4099)])
def test_entries_are_bergsons(shape, kind):
    name = f"layers.0.mlp.up_proj/left/seed{shape[1]}"
    expected = random_matrix(name, *shape, "cpu", kind).numpy()
    make = jax.jit(random_entries, static_argnums=(1, 2, 3))
    found = np.asarray(make(projection_key(name), *shape, kind))
    assert found.dtype == np.float32
    if kind == "rademacher":
        np.testing.assert_array_equal(found, expected)
    else:
        assert np.abs(found - expected).max() < NORMAL_ENTRIES * np.abs(expected).max()


def test_64_bit_integers_change_nothing():
    key = projection_key("a")
    with jax.enable_x64(True):
        wide = np.asarray(jax.jit(lambda key: random_entries(key, 4, 200, "rademacher"))(key))
    np.testing.assert_array_equal(wide, random_matrix("a", 4, 200, "cpu", "rademacher"))
    assert wide.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_is_the_whole_matrixs(kind):
    key = projection_key("a")
    whole = random_matrix("a", 7, 700, "cpu", kind).numpy()
    part = jax.jit(lambda first: random_entries(key, 5, 300, kind, first))(jnp.uint32(256))
    if kind == "normal":
        assert relative_error(part, whole[:5, 256:556]) < NORMAL_ENTRIES
        return
    np.testing.assert_array_equal(part, whole[:5, 256:556])


@pytest.mark.parametrize(
    ("kind", "scale", "seed"), [("rademacher", "jl", None), ("normal", "row_norm", 5)]
)
def test_scaled_matrices_are_bergsons(kind, scale, seed):
    projection = Projection(6, kind, scale, seed)
    keys = np.stack([projection.key("h.0.mlp.c_fc", role) for role in ("left", "right")])
    found = jax.jit(lambda keys: projection.matrices(keys, (40, 131)))(keys)
    for role, columns, matrix in zip(("left", "right"), (40, 131), found, strict=True):
        expected = bergson_collector.create_module_projection_matrix(
            "h.0.mlp.c_fc", role, 6, columns, torch.float32, torch.device("cpu"), kind, scale, seed
        )
        assert relative_error(matrix, expected.numpy()) < NORMAL_ENTRIES


def test_one_compilation_serves_all_keys():
    calls = []

    @jax.jit
    def make(key):
        calls.append(1)
        return random_entries(key, 4, 10, "rademacher")

    first, second = (np.asarray(make(projection_key(name))) for name in "ab")
    assert len(calls) == 1 and (first != second).any()


@pytest.mark.parametrize("columns", [1, 128, 1000, 3000, 7001])
def test_chunks_cover_every_column_once(columns, monkeypatch):
    monkeypatch.setattr(module, "GLOBAL_BLOCK", 7 * 2500)
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 7 * 300)
    projection = Projection(7)
    width, chunks = global_chunks(projection, columns)
    seen = np.zeros(columns, int)
    for block, first, start, valid in zip(*chunks.values(), strict=True):
        assert first % 128 == 0 and start == block * 2500 + first and 0 < valid <= width
        seen[start : start + valid] += 1
    assert (seen == 1).all()
    assert len(projection.global_keys("m", columns)) == 1 + max(chunks["block"])


@pytest.mark.parametrize(
    ("kind", "scale", "tokens", "scaled"),
    [
        ("rademacher", "jl", False, True),
        ("rademacher", "row_norm", True, False),
        ("normal", "row_norm", True, True),
    ],
)
def test_a_global_projection_is_bergsons(kind, scale, tokens, scaled, monkeypatch):
    """Several blocks, several chunks of each, which begin and end inside rows of the gradient."""
    p, columns_per_block = 7, 205
    for where, name in ((module, "GLOBAL_BLOCK"),
                        (bergson_collector, "CHUNKED_PROJECTION_INSTANTIATION_NUMEL")):  # fmt: skip
        monkeypatch.setattr(where, name, p * columns_per_block)
    monkeypatch.setattr(module, "CHUNK_ENTRIES", p * 128)
    random = np.random.default_rng(0)
    u, v = random.standard_normal((3, 5, 2, 13)), random.standard_normal((3, 5, 2, 37))
    factor = random.random((13, 37)) if scaled else np.ones((13, 37))
    gradients = np.einsum("nsto,nsti->nsoi" if tokens else "nsto,nsti->noi", u, v) * factor
    expected = bergson_collector.project_global(
        "m/single/seed3", torch.tensor(gradients.reshape(-1, 13 * 37)), p, kind, scale
    ).numpy()
    projection = Projection(p, kind, scale, seed=3)
    keys = projection.global_keys("m", 13 * 37)
    assert len(keys) == 3

    @jax.jit
    def project(keys, u, v, factor):
        given = factor if scaled else None
        return project_global(projection, keys, u, v, factor=given, tokens=tokens)

    arrays = (x.astype(np.float32) for x in (u, v, factor))
    with jax.default_matmul_precision("highest"):
        found = np.asarray(project(keys, *arrays))
    assert found.shape == ((3, 5, p) if tokens else (3, p))
    assert relative_error(found.reshape(-1, p), expected) < FACTORS


def test_the_global_matrix_never_exists():
    """Of a matrix of a gigabyte, compiled code holds chunks only."""
    projection = Projection(64)
    u, v = (jax.ShapeDtypeStruct((2, 4, 1, 2048), jnp.float32),) * 2
    keys = jax.ShapeDtypeStruct((2048 * 2048 // projection.global_block, 2), jnp.uint32)
    compiled = jax.jit(lambda *x: project_global(projection, *x)).lower(keys, u, v).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 200 << 20
