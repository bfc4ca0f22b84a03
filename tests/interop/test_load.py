"""Factors come back the same from any number of shards, and damage is named."""

import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jhessians.errors import CheckpointError
from jhessians.influence.factors import load_factors
from jhessians.interop.layout import KINDS
from jhessians.interop.load import FactorStore
from tests.interop.synthetic import N_DOCS, SIZES, TOTAL, export, make_factors


@pytest.fixture(scope="module")
def factors():
    return make_factors()


def test_remainder_in_the_last_shard_is_caught(tmp_path):
    """The wrong twin: rows are all there, but not where bergson's ranks look for them."""
    whole = np.arange(20, dtype=np.float32).reshape(5, 4)
    folder = tmp_path / "eigenvalue_sharded"
    folder.mkdir()
    for index, rows in enumerate((whole[:2], whole[2:])):
        safetensors.numpy.save_file({"m": rows}, folder / f"shard_{index}.safetensors")
    with pytest.raises(CheckpointError, match=r"m has shape \(2, 4\); expected \(3, 4\)"):
        load_factors(tmp_path)


@pytest.mark.parametrize("layout", ["both", "bergson", "influence_results"])
def test_our_reader_gives_the_same_for_any_number_of_shards(tmp_path, factors, layout):
    for count in (1, 3, 8):
        root = tmp_path / str(count)
        export(root, factors, layout=layout, shards=count)
        store = FactorStore(root)
        assert store.shards == count
        assert store.modules == tuple(SIZES)
        assert store.total_processed == TOTAL
        assert store.layout == ("influence_results" if layout == "influence_results" else "bergson")
        read = load_factors(root)
        for kind in store.kinds:
            for module, value in factors[kind].items():
                if layout == "influence_results" and kind == "eigenvalue_correction":
                    value = value * np.float32(N_DOCS / TOTAL)
                np.testing.assert_array_equal(read[kind][module], value)
        assert set(read) == set(factors) if layout != "influence_results" else len(read) == 5


def test_bfloat16_survives_a_round_trip(tmp_path, factors):
    export(tmp_path, factors, dtype="bf16")
    read = load_factors(tmp_path, ["eigenvalue"])["eigenvalue"]["tiny"]
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read, factors["eigenvalue"]["tiny"].astype(ml_dtypes.bfloat16))


def test_a_damaged_or_incomplete_directory_says_what_is_wrong(tmp_path, factors):
    def broken(name, damage, match):
        root = tmp_path / name
        export(root, factors, layout="bergson", shards=3)
        damage(root)
        with pytest.raises(CheckpointError, match=match) as raised:
            load_factors(root)
            _ = FactorStore(root).modules
        assert "\n" not in str(raised.value)

    def shard(root, index, folder="activation_sharded"):
        return root / folder / f"shard_{index}.safetensors"

    def drop_module(root):
        part = safetensors.numpy.load_file(shard(root, 1))
        del part["tiny"]
        safetensors.numpy.save_file(part, shard(root, 1))

    def drop_everywhere(root):
        for index in range(3):
            path = shard(root, index, "eigenvalue_sharded")
            part = safetensors.numpy.load_file(path)
            safetensors.numpy.save_file({"tiny": part["tiny"]}, path)

    def keep_two(root):
        for entry in KINDS.values():
            shard(root, 2, entry.folder).unlink()

    broken("gap", lambda root: shard(root, 1).unlink(), "shard_1.safetensors is missing")
    broken("last", lambda root: shard(root, 2).unlink(), "has 2 shards where another folder has 3")
    broken("all last", keep_two, r"(has shape|has \d+ rows in 2 shards)")
    broken("keys", drop_module, "shards 0 and 1 hold different modules.*not tiny in one only")
    broken("kinds", drop_everywhere, "hold different modules; expected the same")
    broken("cut", lambda root: os.truncate(shard(root, 0), 100), "is truncated or damaged")
    with pytest.raises(CheckpointError, match="holds no factors"):
        load_factors(tmp_path / "nowhere")
