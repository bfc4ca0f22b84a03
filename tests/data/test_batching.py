"""Batches: bounded shapes, little padding, every document once."""

import math
import time
from itertools import combinations, pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jhessians.data import Batch, Documents, iterate_batches, plan_batches
from jhessians.data.batching import MOST_SHAPES, SHAPE_COST
from jhessians.errors import DatasetError


def make_documents(lengths, *, with_labels=False, seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, 1000, offsets[-1], dtype=np.int32)
    labels = None
    if with_labels:
        labels = np.where(rng.random(offsets[-1]) < 0.5, -100, tokens).astype(np.int32)
    return Documents(tokens, labels, offsets)


def natural_lengths(count=2000, seed=0, *, median=150, spread=1.0, cut=2048):
    drawn = np.random.default_rng(seed).lognormal(np.log(median), spread, count)
    return np.clip(drawn, 1, cut).astype(np.int64)


def check(plan, lengths, token_batch_size, devices, max_shapes, longest=None):
    lengths = np.asarray(lengths)
    assert len(plan.shapes) <= max_shapes
    assert plan.shapes == {shape for _, shape in plan.batches}
    seen = np.concatenate([documents for documents, _ in plan.batches])
    assert sorted(seen.tolist()) == np.flatnonzero(lengths >= 2).tolist()
    assert plan.skipped == (lengths < 2).sum()
    padded = 0
    for documents, (rows, length) in plan.batches:
        assert 0 < len(documents) <= rows
        assert rows % devices == 0
        assert rows // devices * length <= token_batch_size
        assert lengths[documents].max() <= length <= max(longest or lengths.max(), 8)
        padded += rows * length
    assert plan.padding_share == pytest.approx(1 - lengths[seen].sum() / padded)
    widths = [length for _, (_, length) in plan.batches]
    assert widths == sorted(widths, reverse=True)


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=200),
    token_batch_size=st.integers(300, 3000),
    devices=st.sampled_from([1, 2, 3, 8]),
    max_shapes=st.integers(1, 8),
)
def test_any_data_set(lengths, token_batch_size, devices, max_shapes):
    sizes = {"token_batch_size": token_batch_size, "devices": devices, "max_shapes": max_shapes}
    if max(lengths) < 2:
        with pytest.raises(DatasetError):
            plan_batches(np.array(lengths), **sizes)
        return
    check(plan_batches(np.array(lengths), **sizes), lengths, **sizes)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.sampled_from([3, 9, 17, 30, 41, 64]), min_size=1, max_size=30),
    copies=st.sampled_from([1, 20, 60, 400]),  # few are worth one shape, many all
    devices=st.sampled_from([1, 2]),
    max_shapes=st.integers(1, 6),
)
def test_no_choice_of_buckets_costs_less(lengths, copies, devices, max_shapes):
    sizes = np.repeat(lengths, copies)
    plan = plan_batches(
        sizes, token_batch_size=128, devices=devices, max_shapes=max_shapes, max_length=64
    )
    rounded = -(-sizes // 8) * 8
    distinct = np.unique(rounded)
    best = np.inf
    for count in range(1, min(max_shapes, len(distinct)) + 1):
        for inner in combinations(distinct[:-1], count - 1):
            bounds = [0, *inner, distinct[-1]]
            cost = SHAPE_COST * count
            for low, high in pairwise(bounds):
                documents = int(((rounded > low) & (rounded <= high)).sum())
                batches = math.ceil(documents / (devices * (128 // high)))
                rows = devices * math.ceil(documents / batches / devices)
                cost += batches * rows * int(high)
            best = min(best, cost)
    computed = sum(rows * length for _, (rows, length) in plan.batches)
    assert computed + SHAPE_COST * len(plan.shapes) == best


def test_a_shape_must_save_what_its_compilation_costs():
    short, long = np.full(1000, 8), np.full(8, 64)
    saved = 1000 * (64 - 8)
    assert saved > SHAPE_COST
    both = plan_batches(np.concatenate([short, long]), token_batch_size=512)
    assert {length for _, length in both.shapes} == {8, 64}
    few = plan_batches(np.concatenate([short[:100], long]), token_batch_size=512)
    assert {length for _, length in few.shapes} == {64}  # 100 · 56 positions are not worth it


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("token_batch_size", [2048, 8192])
@pytest.mark.parametrize(
    ("median", "spread", "cut"),
    [(150, 0.3, 2048), (150, 0.6, 2048), (150, 1.0, 2048), (150, 1.3, 2048)]
    + [(400, 1.0, 1024), (400, 1.0, 2048), (400, 1.3, 1024)],
)
def test_natural_lengths_are_padded_by_a_tenth_at_most(
    median, spread, cut, token_batch_size, devices
):
    # Enough documents that shapes are worth their compilations.
    lengths = natural_lengths(20_000, median=median, spread=spread, cut=cut)
    plan = plan_batches(lengths, token_batch_size=token_batch_size, devices=devices, max_length=cut)
    check(plan, lengths, token_batch_size, devices, MOST_SHAPES, longest=cut)
    assert plan.padding_share <= 0.10


def test_few_documents_are_padded_rather_than_compiled_for():
    lengths = natural_lengths(300)
    plan = plan_batches(lengths, token_batch_size=2048, max_length=2048)
    assert len(plan.shapes) <= 6
    assert 0.10 < plan.padding_share < 0.35


def test_plan_is_deterministic():
    plans = [plan_batches(natural_lengths(), token_batch_size=2048) for _ in range(2)]
    for one, other in zip(plans[0].batches, plans[1].batches, strict=True):
        np.testing.assert_array_equal(one.documents, other.documents)
        assert one.shape == other.shape


def test_a_million_documents_are_planned_in_seconds():
    lengths = np.random.default_rng(0).integers(2, 100_000, 1_000_000)
    start = time.monotonic()
    plan = plan_batches(lengths, token_batch_size=131_072, devices=8)
    assert time.monotonic() - start < 15
    assert len(plan.shapes) <= MOST_SHAPES
    assert sum(len(documents) for documents, _ in plan.batches) == 1_000_000
    assert plan.padding_share < 0.12


def test_shapes_do_not_grow_with_the_data():
    for count in (50, 500, 5000):
        plan = plan_batches(natural_lengths(count), token_batch_size=2048, max_shapes=4)
        assert len(plan.shapes) <= 4


def test_equal_lengths_need_one_shape():
    plan = plan_batches(np.full(100, 64), token_batch_size=512)
    assert plan.shapes == {(8, 64)}
    assert plan.padding_share == pytest.approx(1 - 100 / 104)


@pytest.mark.parametrize(
    ("documents", "devices", "rows"),
    [(10, 1, 5), (8, 1, 8), (3, 1, 3), (17, 1, 6), (3, 8, 8), (65, 8, 40), (1000, 1, 8)],
)
def test_rows_are_balanced(documents, devices, rows):
    plan = plan_batches(np.full(documents, 64), token_batch_size=512, devices=devices)
    assert plan.shapes == {(rows, 64)}


def test_rounding_stays_within_the_models_positions():
    assert plan_batches(np.array([21]), token_batch_size=512).shapes == {(1, 21)}
    assert plan_batches(np.array([21]), token_batch_size=512, max_length=40).shapes == {(1, 24)}
    assert plan_batches(np.array([21]), token_batch_size=22, max_length=40).shapes == {(1, 22)}


def test_what_can_not_be_planned():
    with pytest.raises(DatasetError, match="document 1 has 90 tokens"):
        plan_batches(np.array([3, 90]), token_batch_size=64)
    with pytest.raises(DatasetError, match="2 tokens"):
        plan_batches(np.array([0, 1, 1]), token_batch_size=64)
    with pytest.raises(ValueError):
        plan_batches(np.array([3]), token_batch_size=64, devices=0)


@pytest.mark.parametrize("with_labels", [False, True])
def test_batches_hold_the_documents(with_labels):
    lengths = np.concatenate([[0, 1], natural_lengths(150)])
    documents = make_documents(lengths, with_labels=with_labels)
    plan = plan_batches(documents.lengths, token_batch_size=2048, devices=2)
    seen, positions = [], 0
    for batch, (_, shape) in zip(iterate_batches(documents, plan), plan.batches, strict=True):
        assert batch.tokens.shape == batch.labels.shape == batch.position_mask.shape == shape
        assert batch.tokens.dtype == batch.labels.dtype == batch.document.dtype == np.int32
        assert batch.position_mask.dtype == bool
        for row, index in enumerate(batch.document):
            tokens, labels = documents.document(index) if index >= 0 else (np.zeros(0),) * 2
            end = len(tokens)
            np.testing.assert_array_equal(batch.tokens[row, :end], tokens)
            np.testing.assert_array_equal(batch.labels[row, :end], labels)
            assert not batch.tokens[row, end:].any()
            assert (batch.labels[row, end:] == -100).all()
            expected = np.arange(shape[1]) + 1 < end
            np.testing.assert_array_equal(batch.position_mask[row], expected)
            seen += [index] * int(index >= 0)
        positions += int(batch.position_mask.sum())
    assert sorted(seen) == np.flatnonzero(lengths >= 2).tolist()
    assert positions == documents.positions


def test_masks_and_labels_equal_bergson():
    from bergson.data import pad_and_tensor

    documents = make_documents(np.array([9, 5, 2, 9]), with_labels=True)
    plan = plan_batches(documents.lengths, token_batch_size=64, max_shapes=1)
    (batch,) = iterate_batches(documents, plan)
    rows = [documents.document(i) for i in batch.document]
    tokens, labels, _, masks = pad_and_tensor(
        [row.tolist() for row, _ in rows], [row.tolist() for _, row in rows]
    )
    np.testing.assert_array_equal(batch.tokens, tokens.numpy())
    np.testing.assert_array_equal(batch.labels, labels.numpy())
    np.testing.assert_array_equal(batch.position_mask, masks.numpy())


def test_processes_share_the_rows():
    documents = make_documents(natural_lengths(100))
    plan = plan_batches(documents.lengths, token_batch_size=2048, devices=4)
    whole = list(iterate_batches(documents, plan))
    shares = [
        list(iterate_batches(documents, plan, process_index=i, process_count=4)) for i in range(4)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert len({part.tokens.shape for part in parts}) == 1
        jax.tree.map(np.testing.assert_array_equal, batch, _joined(parts))
    with pytest.raises(ValueError, match="3 processes"):
        next(iterate_batches(documents, plan, process_index=0, process_count=3))
    with pytest.raises(ValueError):
        next(iterate_batches(documents, plan, process_index=4, process_count=4))


def _joined(parts):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def test_batch_is_a_pytree_and_shapes_compile_once():
    documents = make_documents(natural_lengths(200))
    plan = plan_batches(documents.lengths, token_batch_size=2048)
    traces = []

    @jax.jit
    def count(batch: Batch):
        traces.append(batch.tokens.shape)
        return batch.position_mask.sum()

    total = sum(int(count(batch)) for batch in iterate_batches(documents, plan))
    assert total == documents.positions
    assert sorted(traces) == sorted(plan.shapes)
