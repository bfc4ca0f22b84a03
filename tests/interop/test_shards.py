"""Shards of any number, dtype and device: right bytes, little memory, clear failures."""

import builtins
import errno
import os
import resource
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from bergson.hessians.preconditioner import _load_full, _load_shard
from bergson.hessians.sharded_computation import shard_bounds as bergson_shard_bounds
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.errors import NumericsError, OutputError
from jhessians.interop import shards as shards_module
from jhessians.interop.export import (
    ArrayRows,
    Destination,
    ScaledRows,
    link_or_copy,
    write_sharded,
)
from jhessians.interop.layout import DTYPES, shard_bounds
from tests.interop.synthetic import files_in, make_factors


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("dimension", [0, 1, 5, 8, 120, 321])
def test_shard_bounds_are_bergsons_and_cover_every_row(dimension, count):
    bounds = [shard_bounds(dimension, count, index) for index in range(count)]
    assert bounds == [bergson_shard_bounds(dimension, index, count) for index in range(count)]
    assert [row for bound in bounds for row in range(*bound)] == list(range(dimension))


def test_shard_bounds_refuses_a_shard_that_is_not_there():
    for index in (-1, 3):
        with pytest.raises(ValueError, match="no shard"):
            shard_bounds(10, 3, index)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_shard_equals_one_of_the_safetensors_library(tmp_path, dtype):
    name, target = DTYPES[dtype]
    wide = make_factors(np.float64)["eigenvalue"]
    tensors = {module: ArrayRows(value) for module, value in wide.items()}
    write_sharded(tmp_path / "ours", tensors, shards=1, dtype=dtype, block_bytes=1000)
    expected = {module: value.astype(target) for module, value in wide.items()}
    safetensors.numpy.save_file(expected, tmp_path / "theirs.safetensors")
    path = tmp_path / "ours" / "shard_0.safetensors"
    with (
        safetensors.safe_open(path, "np") as ours,
        safetensors.safe_open(tmp_path / "theirs.safetensors", "np") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        for module in theirs.keys():
            assert ours.get_slice(module).get_dtype() == name
            assert ours.get_tensor(module).tobytes() == theirs.get_tensor(module).tobytes()
    raw = path.read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    whole = _load_shard(tmp_path, "ours", 0, "cpu")["tiny"]
    np.testing.assert_array_equal(whole.numpy(), expected["tiny"].astype(np.float32))


class Made:
    """Rows made when asked for, so that only the exporter's memory is measured."""

    shape = (1024, 512)

    def rows(self, start, stop, *, everywhere=True):
        return np.full((stop - start, 512), start, np.float64)


def test_peak_memory_is_a_block_not_a_shard(tmp_path):
    tensors = {f"m{index}": Made() for index in range(8)}
    write_sharded(tmp_path / "warm", {"m": Made()}, shards=1, dtype="fp32")
    tracemalloc.start()
    write_sharded(tmp_path / "x", tensors, shards=2, dtype="fp32", block_bytes=64 << 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shard = (tmp_path / "x" / "shard_0.safetensors").stat().st_size
    assert shard > 8 << 20
    # A float64 block, its float32 copy, one more of each in flight, and the file's buffer.
    assert peak < 8 * (64 << 10)


def test_rewriting_a_folder_leaves_its_hard_links_alone(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    write_sharded(first, {"m": ArrayRows(np.ones((4, 2)))}, shards=1, dtype="fp32")
    link_or_copy(first, second)
    write_sharded(first, {"m": ArrayRows(np.zeros((4, 2)))}, shards=1, dtype="fp32")
    assert _load_full(tmp_path, "b", "cpu")["m"].sum() == 8


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_files_are_copied_where_links_are_impossible(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    write_sharded(tmp_path / "a", {"m": ArrayRows(np.ones((4, 2)))}, shards=2, dtype="fp32")
    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    for shard in (tmp_path / "a").iterdir():
        copy = tmp_path / "b" / shard.name
        assert copy.read_bytes() == shard.read_bytes() and not copy.samefile(shard)


def test_other_link_failures_are_reported(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EACCES, "no")

    write_sharded(tmp_path / "a", {"m": ArrayRows(np.ones((4, 2)))}, shards=1, dtype="fp32")
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match="permission denied"):
        link_or_copy(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_module_and_folder(tmp_path, bad):
    value = np.ones((9, 2), np.float32)
    value[7, 1] = bad
    tensors = {"good": ArrayRows(np.ones((9, 2))), "h.3.bad": ArrayRows(value)}
    with pytest.raises(NumericsError, match=r"^h\.3\.bad in gradient_sharded holds NaN") as raised:
        write_sharded(tmp_path / "gradient_sharded", tensors, shards=3, dtype="fp32")
    assert "\n" not in str(raised.value)
    assert not list(files_in(tmp_path))  # shards grow side by side, and none stays half-written


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_half_precision_overflow_is_an_error_and_bfloat16_is_not(tmp_path, stored):
    big = {"h.0": ArrayRows(np.full((2, 2), 1e5, stored))}
    with pytest.raises(NumericsError, match=r"h\.0 in x holds .*float16's range"):
        write_sharded(tmp_path / "x", big, shards=1, dtype="fp16")
    write_sharded(tmp_path / "x", big, shards=1, dtype="bf16")


def test_disk_full_is_one_line_and_leaves_no_partial_shard(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if self.file.tell() + len(data) > 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

    monkeypatch.setattr(shards_module, "open", lambda *a: Full(builtins.open(*a)), raising=False)
    tensors = {f"m{index}": ArrayRows(np.ones((20, 20))) for index in range(4)}
    with pytest.raises(OutputError, match="the disk is full; free some space") as raised:
        write_sharded(tmp_path / "x", tensors, shards=2, dtype="fp32")
    assert "\n" not in str(raised.value)
    assert files_in(tmp_path) == set()


def test_the_kernels_own_refusal_to_write_is_reported(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OutputError, match="a file grew beyond the limit"):
            tensors = {"m": ArrayRows(np.ones((100, 100)))}
            write_sharded(tmp_path / "x", tensors, shards=1, dtype="fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("spec", [P(None, ("x", "y")), P(None, "x", "y"), P(None, "y"), P()])
def test_a_padded_stack_over_eight_devices(tmp_path, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    whole = np.random.default_rng(0).standard_normal((3, 328, 322)).astype(np.float32)
    stack = jax.device_put(whole, NamedSharding(mesh, spec))
    tensors = {f"h.{layer}": ArrayRows(stack, index=layer, shape=(321, 321)) for layer in range(3)}
    destination = Destination(tmp_path, documents=1, total_processed=1, layout="bergson", shards=7)
    destination.write_kind("activation_covariance", tensors)
    written = _load_full(tmp_path, "activation_sharded", "cpu")
    for layer in range(3):
        np.testing.assert_array_equal(written[f"h.{layer}"].numpy(), whole[layer, :321, :321])


def test_sources_of_every_make_give_the_same_rows():
    whole = np.arange(2 * 3 * 8 * 5, dtype=np.float32).reshape(2, 3, 8, 5)
    for array in (whole, jax.numpy.asarray(whole)):
        source = ArrayRows(array, index=(1, 2), shape=(7, 4))
        assert source.shape == (7, 4)
        np.testing.assert_array_equal(source.rows(2, 6), whole[1, 2, 2:6, :4])
        assert source.rows(3, 3).shape == (0, 4)
        vector = ArrayRows(array[0, 0], index=3)
        np.testing.assert_array_equal(vector.rows(1, 4), whole[0, 0, 3, 1:4])
    half = ScaledRows(ArrayRows(whole[0, 0].astype(ml_dtypes.bfloat16)), 1 / 3)
    assert half.rows(0, 8).dtype == np.float32
    np.testing.assert_array_equal(half.rows(0, 8), whole[0, 0] * np.float32(1 / 3))
    for wrong in ({"index": 2}, {"index": -1}, {"shape": (2, 3, 8, 6)}, {"shape": (2,)}):
        with pytest.raises(ValueError, match="no entry"):
            ArrayRows(whole, **wrong)
