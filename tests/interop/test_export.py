"""What we write is what bergson reads, and the tree that earlier versions of it wrote."""

import json
import os

import numpy as np
import pytest
import torch
from bergson.config.config import InversionConfig
from bergson.gradients import GradientProcessor
from bergson.hessians.preconditioner import FactoredPreconditioner, _load_full, _load_shard
from bergson.hessians.sharded_computation import shard_bounds as bergson_shard_bounds

from jhessians.interop.layout import KINDS, kind_folder
from jhessians.interop.load import FactorStore
from tests.interop.synthetic import N_DOCS, SIZES, TOTAL, export, files_in, make_factors
from tests.tolerances import DAMPED_INVERSE

OLDER_TREE = {
    "config.json",
    "normalizers.pth",
    "preconditioners.pth",
    "processor_config.json",
    *(
        f"influence_results/{name}"
        for name in (
            "activation_covariance_sharded",
            "activation_eigen_sharded",
            "eigenvalue_correction_sharded",
            "gradient_covariance_sharded",
            "gradient_eigen_sharded",
            "total_processed.pt",
            "total_processed_lambda.pt",
        )
    ),
}


@pytest.fixture(scope="module")
def factors():
    return make_factors()


@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_bergson_reads_every_kind_from_any_number_of_shards(tmp_path, factors, count):
    export(tmp_path, factors, shards=count)
    for kind, entry in KINDS.items():
        folder = tmp_path / entry.folder
        assert sorted(os.listdir(folder)) == sorted(f"shard_{r}.safetensors" for r in range(count))
        for rank in range(count):
            part = _load_shard(tmp_path, entry.folder, rank, "cpu")
            for module, expected in factors[kind].items():
                rows = slice(*bergson_shard_bounds(len(expected), rank, count))
                expected = expected if entry.replicated else expected[rows]
                np.testing.assert_array_equal(part[module].numpy(), expected)
        if not entry.replicated:
            whole = _load_full(tmp_path, entry.folder, "cpu")
            for module, expected in factors[kind].items():
                np.testing.assert_array_equal(whole[module].numpy(), expected)
    assert torch.load(tmp_path / "total_processed.pt", weights_only=True).item() == TOTAL


@pytest.mark.parametrize(
    ("inversion", "corrected"),
    [("damped_inverse", False), ("damped_inverse", True), ("factored_tikhonov", False)],
)
def test_bergson_applies_the_inverse_of_what_we_wrote(tmp_path, factors, inversion, corrected):
    export(tmp_path, factors, layout="bergson", shards=7)
    preconditioner = FactoredPreconditioner.from_path(
        tmp_path,
        inversion_cfg=InversionConfig(inversion=inversion, damping_factor=0.1),
        ev_correction=corrected,
    )
    random = np.random.default_rng(1)
    grads = {name: random.standard_normal((2, o, i)) for name, (o, i) in SIZES.items()}
    flat = {n: torch.tensor(g.reshape(2, -1), dtype=torch.float32) for n, g in grads.items()}
    applied = preconditioner.apply(flat)
    for module, g in grads.items():
        f = {kind: factors[kind][module].astype(np.float64) for kind in factors}
        if inversion == "factored_tikhonov":
            a, s = f["activation_eigenvalues"], f["gradient_eigenvalues"]
            pi = np.sqrt(a.mean() / s.mean())
            damping = np.sqrt(0.1 * a.mean() * s.mean())
            scale = 1 / np.outer(s + damping / pi, a + damping * pi)
        else:
            grid = f["eigenvalue_correction" if corrected else "eigenvalue"]
            scale = 1 / (grid + 0.1 * grid.mean())
        q_a, q_s = f["activation_eigenvectors"], f["gradient_eigenvectors"]
        expected = q_s @ ((q_s.T @ g @ q_a) * scale) @ q_a.T
        ours = applied[module].numpy().reshape(g.shape)
        assert np.abs(ours - expected).max() < DAMPED_INVERSE * np.abs(expected).max()


def test_trees_share_files_and_the_older_one_is_complete(tmp_path, factors):
    export(tmp_path, factors)
    for kind, entry in KINDS.items():
        older = kind_folder(tmp_path, kind, "influence_results")
        if older is None:
            continue
        for shard in older.iterdir():
            same = shard.samefile(tmp_path / entry.folder / shard.name)
            assert same != entry.older_per_position
    assert len(list((tmp_path / "influence_results").iterdir())) == 7


def test_influence_results_layout_writes_the_older_tree_and_nothing_else(tmp_path, factors):
    export(tmp_path, factors, layout="influence_results", shards=4)
    expected = {
        f"{name}/shard_{r}.safetensors" if name.endswith("_sharded") else name
        for name in OLDER_TREE - {"config.json"}  # the run's options come from write_config
        for r in range(4)
    }
    assert files_in(tmp_path) == expected
    results = tmp_path / "influence_results"
    for name in ("total_processed.pt", "total_processed_lambda.pt"):
        count = torch.load(results / name, weights_only=True)
        assert count.dtype == torch.int64 and count.shape == () and count.item() == TOTAL
    for name in ("normalizers.pth", "preconditioners.pth"):
        assert torch.load(tmp_path / name, weights_only=True) == {}
    correction = _load_full(results, "eigenvalue_correction_sharded", "cpu")
    for module, value in factors["eigenvalue_correction"].items():
        np.testing.assert_allclose(correction[module].numpy(), value * (N_DOCS / TOTAL), rtol=1e-6)
    store = FactorStore(results)
    assert store.layout == "influence_results" and store.total_processed == TOTAL


def test_bergson_layout_has_no_files_of_the_older_tree(tmp_path, factors):
    export(tmp_path, factors, layout="bergson", shards=1)
    folders = {f"{entry.folder}/shard_0.safetensors" for entry in KINDS.values()}
    assert files_in(tmp_path) == folders | {"total_processed.pt"}


def test_without_correction_nothing_claims_one(tmp_path, factors):
    export(tmp_path, {k: v for k, v in factors.items() if k != "eigenvalue_correction"})
    assert not any("correction" in name or "lambda" in name for name in files_in(tmp_path))


def test_kinds_must_hold_the_same_modules(tmp_path, factors):
    odd = {**factors, "eigenvalue": {"other": factors["eigenvalue"]["tiny"]}}
    with pytest.raises(ValueError, match="different modules"):
        export(tmp_path, odd)
    with pytest.raises(ValueError, match="unknown kind"):
        export(tmp_path, {"nonsense": factors["eigenvalue"]})


def test_a_second_export_with_fewer_shards_leaves_none_of_the_first(tmp_path, factors):
    export(tmp_path, factors, shards=5)
    before = FactorStore(tmp_path).read("eigenvalue", "tiny")
    export(tmp_path, factors, shards=2)
    assert FactorStore(tmp_path).shards == FactorStore(tmp_path, "influence_results").shards == 2
    np.testing.assert_array_equal(FactorStore(tmp_path).read("eigenvalue", "tiny"), before)


def test_the_older_processor_file_has_no_key_its_reader_lacks(tmp_path, factors):
    """Its reader passed every key of processor_config.json on as an argument."""
    export(tmp_path, factors, layout="influence_results")
    keys = json.loads((tmp_path / "processor_config.json").read_text())
    assert set(keys) == {"projection_dim", "reshape_to_square", "projection_type"}
    assert GradientProcessor(**keys).projection_dim is None
