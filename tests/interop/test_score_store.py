"""bergson reads the scores written here, and its own are read here."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bergson.data import load_scores
from bergson.score.score_writer import (
    MemmapSequenceScoreWriter,
    MemmapTokenScoreWriter,
    _score_struct_dtype,
)

from jhessians.errors import CheckpointError, NumericsError, OutputError
from jhessians.interop.score_store import ScoreStore, ScoreWriter, needed_bytes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_scores(rows, queries):
    return np.random.default_rng(0).normal(size=(rows, queries)).astype(np.float32)


@pytest.mark.parametrize("queries", [1, 2, 7, 300])
def test_bergson_reads_documents_written_here(tmp_path, queries):
    scores = random_scores(11, queries)
    writer = ScoreWriter(tmp_path / "a" / "b", documents=11, queries=queries)
    writer.write(np.array([10, 0, 3]), scores[[10, 0, 3]])
    assert not load_scores(tmp_path / "a" / "b").is_written()
    rest = np.setdiff1d(np.arange(11), [10, 0, 3])
    writer.write(rest, scores[rest])
    writer.flush()
    read = load_scores(tmp_path / "a" / "b")
    assert len(read) == 11 and read.num_scores == queries and read.is_written()
    assert read.offsets is None and read.candidates is None
    np.testing.assert_array_equal(read[:], scores)
    np.testing.assert_array_equal(read.get(slice(None), queries - 1), scores[:, -1])


@pytest.mark.parametrize("queries", [1, 5])
def test_files_equal_bergsons_to_the_byte(tmp_path, queries):
    scores = random_scores(9, queries)
    ScoreWriter(tmp_path / "ours", documents=9, queries=queries).write(np.arange(9), scores)
    theirs = MemmapSequenceScoreWriter(tmp_path / "theirs", 9, queries)
    theirs(list(range(9)), torch.from_numpy(scores))
    theirs.flush()
    for name in ("info.json", "scores.bin"):
        ours = (tmp_path / "ours" / name).read_bytes()
        assert ours == (tmp_path / "theirs" / name).read_bytes(), name
    _, described = _score_struct_dtype(queries, np.dtype(np.float32))
    assert json.loads((tmp_path / "ours" / "info.json").read_text())["dtype"] == described


def test_bergson_reads_tokens_written_here(tmp_path):
    offsets = np.array([0, 3, 3, 7])
    scores = random_scores(7, 2)
    writer = ScoreWriter(tmp_path, documents=3, queries=2, offsets=offsets)
    writer.write(np.arange(7), scores)
    writer.flush()
    read = load_scores(tmp_path)
    np.testing.assert_array_equal(read.offsets, offsets)
    np.testing.assert_array_equal(read[:], scores)
    np.testing.assert_array_equal(read.to_grid()[2, :4], scores[3:])
    store = ScoreStore(tmp_path)
    assert (store.documents, store.rows, store.queries) == (3, 7, 2)
    np.testing.assert_array_equal(store.offsets, offsets)


def test_bergson_reads_candidates_written_here(tmp_path):
    writer = ScoreWriter(tmp_path, documents=3, queries=1, candidates=np.array([2, 5, 8]))
    writer.write(np.arange(3), random_scores(3, 1))
    np.testing.assert_array_equal(load_scores(tmp_path).candidates, [2, 5, 8])
    np.testing.assert_array_equal(ScoreStore(tmp_path).candidates, [2, 5, 8])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_documents_written_by_bergson_are_read(tmp_path, dtype, queries):
    scores = random_scores(6, queries)
    writer = MemmapSequenceScoreWriter(tmp_path, 6, queries, dtype=dtype)
    writer([4, 1], torch.from_numpy(scores[[4, 1]]))
    writer.flush()
    store = ScoreStore(tmp_path)
    assert (store.documents, store.rows, store.queries) == (6, 6, queries)
    values, written = store.read(queries - 1)
    assert values.dtype == np.float32 and not store.complete
    np.testing.assert_array_equal(written, [False, True, False, False, True, False])
    rounded = torch.from_numpy(scores).to(dtype).to(torch.float32).numpy()
    np.testing.assert_array_equal(values[[1, 4]], rounded[[1, 4], -1])
    writer(list(range(6)), torch.from_numpy(scores))
    writer.flush()
    assert ScoreStore(tmp_path).complete
    np.testing.assert_array_equal(ScoreStore(tmp_path).read_all(), rounded)


def test_tokens_written_by_bergson_are_read(tmp_path):
    scores = random_scores(6, 3)
    writer = MemmapTokenScoreWriter(tmp_path, np.array([2, 0, 4]), 3)
    writer([0, 1, 2], torch.from_numpy(scores))
    writer.flush()
    store = ScoreStore(tmp_path)
    assert (store.documents, store.rows) == (3, 6)
    np.testing.assert_array_equal(store.offsets, [0, 2, 2, 6])
    np.testing.assert_array_equal(store.read_all(), scores)


def test_an_interrupted_store_is_continued(tmp_path):
    scores = random_scores(4, 6)
    first = ScoreWriter(tmp_path, documents=4, queries=6)
    first.write(np.arange(4), scores[:, 2:4], first_query=2)
    first.flush()
    again = ScoreWriter(tmp_path, documents=4, queries=6)
    expected = np.zeros((4, 6), bool)
    expected[:, 2:4] = True
    np.testing.assert_array_equal(again.written, expected)
    again.write(np.arange(4), scores[:, :2])
    again.write(np.arange(4), scores[:, 4:], first_query=4)
    assert ScoreStore(tmp_path).complete
    np.testing.assert_array_equal(ScoreStore(tmp_path).read_all(), scores)


def test_cells_that_are_not_written_stay(tmp_path):
    scores = random_scores(2, 3)
    writer = ScoreWriter(tmp_path, documents=2, queries=3)
    written = np.array([[True, False, True], [False, False, True]])
    writer.write(np.arange(2), np.where(written, scores, np.nan), written=written)
    np.testing.assert_array_equal(writer.written, written)
    writer.write(np.arange(2), -scores, written=~written)
    np.testing.assert_array_equal(
        ScoreStore(tmp_path).read_all(), np.where(written, scores, -scores)
    )


def test_another_store_is_not_overwritten(tmp_path):
    ScoreWriter(tmp_path, documents=4, queries=2)
    for other in (
        {"documents": 4, "queries": 3},
        {"documents": 5, "queries": 2},
        {"documents": 4, "queries": 2, "candidates": np.arange(4)},
        {"documents": 2, "queries": 2, "offsets": np.array([0, 2, 4])},
    ):
        with pytest.raises(OutputError, match="other scores"):
            ScoreWriter(tmp_path, **other)


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    assert needed_bytes(10**6, 1000) == 8 * 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match="GB") as told:
        ScoreWriter(tmp_path, documents=13, queries=1)
    assert "\n" not in str(told.value) and not (tmp_path / "scores.bin").exists()


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    writer = ScoreWriter(tmp_path, documents=3, queries=2)
    for bad in (np.nan, np.inf, 1e300):
        scores = np.array([[1.0, 2.0], [3.0, bad]])
        with pytest.raises(NumericsError, match="row 2 "):
            writer.write(np.array([0, 2]), scores)
    assert not writer.written.any()
    with pytest.raises(IndexError):
        writer.write(np.array([3]), np.ones((1, 2)))
    with pytest.raises(IndexError):
        writer.write(np.array([0]), np.ones((1, 2)), first_query=1)


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    for wrong in (
        {"documents": 0, "queries": 1},
        {"documents": 1, "queries": 0},
        {"documents": 2, "queries": 1, "offsets": np.array([0, 3])},
        {"documents": 2, "queries": 1, "offsets": np.array([0, 3, 2])},
        {"documents": 2, "queries": 1, "candidates": np.array([0])},
    ):
        with pytest.raises(ValueError):
            ScoreWriter(tmp_path, **wrong)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "info.json").unlink(),
        lambda folder: (folder / "info.json").write_text("{"),
        lambda folder: (folder / "info.json").write_text("[]"),
        lambda folder: (folder / "info.json").write_text("{}"),
        lambda folder: (folder / "scores.bin").unlink(),
        lambda folder: (folder / "scores.bin").write_bytes(b"short"),
        lambda folder: (folder / "offsets.npy").unlink(),
        lambda folder: (folder / "offsets.npy").write_bytes(b"no array"),
        lambda folder: np.save(folder / "offsets.npy", np.array([0, 9])),
        lambda folder: np.save(folder / "offsets.npy", np.array([0.0, 1.0, 3.0])),
        lambda folder: np.save(folder / "candidates.npy", np.arange(5)),
    ],
)
def test_damage_is_told(tmp_path, damage):
    ScoreWriter(tmp_path, documents=2, queries=2, offsets=np.array([0, 1, 3]))
    damage(tmp_path)
    with pytest.raises(CheckpointError) as told:
        ScoreStore(tmp_path)
    assert "\n" not in str(told.value)


def test_many_queries_are_written_at_once(tmp_path):
    rows, queries = 64, 20_000
    scores = random_scores(rows, queries)
    start = time.perf_counter()
    writer = ScoreWriter(tmp_path, documents=rows, queries=queries)
    for first in range(0, rows, 8):
        writer.write(np.arange(first, first + 8), scores[first : first + 8])
    seconds = time.perf_counter() - start
    np.testing.assert_array_equal(ScoreStore(tmp_path).read_all(), scores)
    # Field by field it takes 20,000 fields × 8 batches × 2 numpy calls, tens of seconds.
    assert seconds < 5


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_scores_that_are_not_finite_are_named(tmp_path, value):
    ScoreWriter(tmp_path, documents=5, queries=3).write(np.arange(5), random_scores(5, 3))
    cells = np.fromfile(tmp_path / "scores.bin", np.float32).reshape(5, 3, 2)
    cells[3, 1, 0] = value
    cells.tofile(tmp_path / "scores.bin")
    store = ScoreStore(tmp_path)
    store.read(0)
    for read in (store.read_all, lambda: store.read(1)):
        with pytest.raises(NumericsError, match="row 3 of .*scores.bin holds NaN or infinity"):
            read()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_items", float("inf")), ("num_items", "5"), ("num_rows", -5), ("num_scores", 10**15),
        ("num_scores", 0), ("num_scores", True), ("dtype", None), ("dtype", []),
    ],
)  # fmt: skip
def test_absurd_numbers_are_refused_at_once(tmp_path, name, value):
    ScoreWriter(tmp_path, documents=5, queries=3).write(np.arange(5), random_scores(5, 3))
    info = json.loads((tmp_path / "info.json").read_text()) | {name: value}
    (tmp_path / "info.json").write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match="info.json doesn't describe scores"):
        ScoreStore(tmp_path)
