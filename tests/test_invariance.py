"""The same factors whatever the devices, batches, padding, order and shards: 1e-6.

Dimensions are those that divide by nothing: 120 and 321 over 8, 7 and 6 devices.
"""

from itertools import product

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import jhessians
from jhessians.data.batching import Batch
from jhessians.data.documents import Documents
from jhessians.devices.mesh import mark_sharded, parameter_specs
from jhessians.folds.shampoo import Shampoo
from jhessians.folds.tkfac import TKFAC
from jhessians.interop.export import ArrayRows, Destination
from jhessians.models import vocabulary
from tests import small
from tests.small import relative_error
from tests.tolerances import INVARIANCE

UNEVEN = {"hidden_size": 120, "heads": 6, "key_value_heads": 6, "head_size": 20, "mlp_size": 321}
LENGTHS = [5, 11, 2, 9, 16, 16, 1, 7, 13, 3, 8, 12, 6, 16, 4]
PLAIN = {"token_batch_size": 512, "max_shapes": 1}


def sharded(model, mesh):
    """A copy of the model with its parameters spread over the mesh, as `--fsdp` does."""
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    mark_sharded(model, mesh)
    graph, state = nnx.split(model)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(state, mesh))
    state = jax.device_put(state, shardings)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    return nnx.merge(graph, state)


def fit(model, data, batches, *, labels="dataset", devices=1, fsdp=False, axes=None, **options):
    mesh = jhessians.make_mesh(devices, axes=axes) if devices > 1 else None
    loss = jhessians.NextTokenLoss(labels, seed=1)
    sites = jhessians.find_sites(loss, model, batches[0], include_bias=True)
    model = sharded(model, mesh) if fsdp else model
    return jhessians.fit(
        jhessians.Problem(loss, model, sites, mesh=mesh), batches,
        positions=data.positions, documents=len(data), **options,
    )  # fmt: skip


def compare(result, reference):
    """A, S and eigenvalues entry by entry, Λ by its sum: it depends on the eigenvectors chosen."""
    worst = {}
    assert result.keys() == reference.keys()
    for kind, modules in reference.items():
        assert result[kind].keys() == modules.keys()
        if "eigenvectors" in kind:
            continue
        total = np.float64 if kind == "eigenvalue_correction" else None
        for name, expected in modules.items():
            found = result[kind][name]
            assert found.shape == expected.shape
            if total:
                found, expected = found.sum(dtype=total), expected.sum(dtype=total)
            worst[kind, name] = relative_error(found, expected)
    assert max(worst.values()) < INVARIANCE, max(worst.items(), key=lambda item: item[1])


@pytest.fixture(scope="module")
def data():
    return small.documents(LENGTHS)


@pytest.fixture(scope="module")
def model():
    return small.decoder(**UNEVEN, layers=1)


@pytest.fixture(scope="module")
def references(model, data):
    """By labels: one device, one batch. Compiled when first asked for."""
    made = {}

    def reference(labels):
        if labels not in made:
            made[labels] = fit(model, data, small.batches(data, **PLAIN), labels=labels)
        return made[labels]

    return reference


def shuffled(batches, seed=0):
    """Rows in another order within each batch, and the batches too."""
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(batch.document)) for batch in batches]
    rows = zip(batches, orders, strict=True)
    return [Batch(*(x[order] for x in batch)) for batch, order in rows][::-1]


def widened(batches, positions):
    """More padding on the right."""
    more = ((0, 0), (0, positions))
    return [
        Batch(
            np.pad(batch.tokens, more),
            np.pad(batch.labels, more, constant_values=-100),
            np.pad(batch.position_mask, more),
            batch.document,
        )
        for batch in batches
    ]


@pytest.mark.parametrize(
    ("labels", "devices", "fsdp", "rows"),
    [
        pytest.param("sampled", 8, True, 512, marks=pytest.mark.slow),
        ("dataset", 7, False, 32),
        ("sampled", 6, True, 32),
    ],
)
def test_devices(references, model, data, labels, devices, fsdp, rows):
    batches = small.batches(data, token_batch_size=rows, max_shapes=1, devices=devices)
    result = fit(model, data, batches, labels=labels, devices=devices, fsdp=fsdp)
    compare(result, references(labels))


@pytest.mark.parametrize("axes", ["2x4", "data=2,fsdp=2x2"])
def test_arrangements_of_devices(references, model, data, axes, monkeypatch):
    """With slices of the vocabulary that are one block of tokens each."""
    monkeypatch.setattr(vocabulary, "SLICE_LOGITS", 1)
    batches = small.batches(data, token_batch_size=32, max_shapes=1, devices=8)
    given = {"labels": "sampled", "devices": 8, "fsdp": True, "axes": axes}
    compare(fit(model, data, batches, **given), references("sampled"))


def reordered(data, seed=0):
    """The same documents in another order."""
    order = np.random.default_rng(seed).permutation(len(data))
    rows = [data.document(int(i))[0] for i in order]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Documents(np.concatenate(rows), None, offsets)


@pytest.mark.parametrize("labels", ["dataset", "sampled"])
def test_batches_padding_and_order(references, model, data, labels):
    # A sampled label belongs to its document's number, so only rows may change places then.
    moved = reordered(data) if labels == "dataset" else data
    batches = small.batches(moved, token_batch_size=64, max_shapes=1)
    assert len(batches) > 2
    compare(fit(model, moved, widened(shuffled(batches), 3), labels=labels), references(labels))


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_shards_on_disk(references, tmp_path, data, shards):
    factors = references("dataset")
    sources = {
        kind: {name: ArrayRows(value) for name, value in modules.items()}
        for kind, modules in factors.items()
    }
    Destination(
        tmp_path, documents=len(data), total_processed=data.positions,
        layout="bergson", shards=shards,
    ).write_factors(sources)  # fmt: skip
    loaded = jhessians.load_factors(tmp_path)
    assert loaded.keys() == factors.keys()
    for kind, modules in factors.items():
        assert loaded[kind].keys() == modules.keys()
        for name, value in modules.items():
            np.testing.assert_array_equal(loaded[kind][name], value)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("labels", ["dataset", "sampled"])
def test_everything_against_everything(family, labels):
    data = small.documents(LENGTHS * 2, seed=1)
    model = small.decoder(**(UNEVEN | (small.LLAMA if family == "llama" else {})), layers=2)
    expected = fit(model, data, small.batches(data, token_batch_size=1024), labels=labels)
    for devices, fsdp, rows in product([1, 2, 3, 6, 7, 8], [False, True], [32, 128]):
        if fsdp and devices in (1, 7):
            continue  # 7 divides no dimension, so no parameter would be sharded
        batches = small.batches(data, token_batch_size=rows, max_shapes=2, devices=devices)
        batches = widened(shuffled(batches, seed=devices), devices)
        result = fit(model, data, batches, labels=labels, devices=devices, fsdp=fsdp)
        compare(result, expected)


@pytest.mark.parametrize("method", [TKFAC(), Shampoo()], ids=["tkfac", "shampoo"])
def test_methods_whose_unit_is_the_document(model, data, method):
    """All documents on one device, or in small batches on eight, each a unit of its own."""
    whole = fit(model, data, small.batches(data, **PLAIN), method=method)
    batches = small.batches(data, token_batch_size=16, max_shapes=1, devices=8)
    compare(fit(model, data, batches, method=method, devices=8), whole)
