"""Stores of gradients: bergson reads what we write, we read what it writes, and bad folders."""

import json

import ml_dtypes
import numpy as np
import pytest
from bergson.data import (
    create_index,
    create_token_index,
    load_gradients,
    load_module_gradients,
    load_token_gradients,
)

from jhessians.errors import CheckpointError
from jhessians.interop.gradient_store import GradientStore, GradientWriter, store_bytes

SIZES = {"h.0.attn": 6, "h.0.mlp": 3, "h.1.mlp": 1}
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
COUNTS = np.array([2, 0, 3])


def matrix(rows, dtype=np.float32):
    return np.random.default_rng(rows).standard_normal((rows, 10)).astype(dtype)


def write(folder, values, counts=None):
    """A store of ours, its rows last to first and its last module apart."""
    folder.mkdir(exist_ok=True)
    with GradientWriter(folder, SIZES, values.dtype, len(values), counts=counts) as writer:
        for row in reversed(range(len(values))):
            writer.write(row, values[row : row + 1])
        writer.write(0, np.zeros((len(values), 1)), module="h.1.mlp")
        writer.write(0, values[:, 9:], module="h.1.mlp")
        assert writer.cut == 0
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_bergson_reads_ours(tmp_path, dtype):
    values = matrix(5, dtype)
    folder = write(tmp_path / "store", values)
    found = load_gradients(folder)
    assert found.dtype == values.dtype and np.array_equal(found, values)
    assert np.array_equal(load_module_gradients(folder)["h.0.mlp"], values[:, 6:9])
    assert (folder / "gradients.bin").stat().st_size == store_bytes(10, values.dtype, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ours_reads_bergsons(tmp_path, dtype):
    values = matrix(4, dtype)
    theirs = create_index(tmp_path, 4, SIZES, dtype)
    theirs[:] = values
    theirs.flush()
    store = GradientStore(tmp_path)
    assert store.sizes == SIZES and list(store.sizes) == list(SIZES)
    assert store.rows == 4 and store.offsets is None and store.dtype == np.dtype(dtype)
    assert np.array_equal(store.matrix, values)
    assert np.array_equal(store.module("h.0.mlp"), values[:, 6:9])
    assert store.columns("h.1.mlp") == slice(9, 10)


def test_tokens_go_both_ways(tmp_path):
    values = matrix(5)
    folder = write(tmp_path / "ours", values, COUNTS)
    found, counts, offsets = load_token_gradients(folder)
    assert np.array_equal(found, values) and np.array_equal(counts, COUNTS)
    theirs, _ = create_token_index(tmp_path / "theirs", COUNTS, SIZES, np.float32)
    theirs[:] = values
    theirs.flush()
    store = GradientStore(tmp_path / "theirs")
    assert store.offsets is not None and np.array_equal(store.offsets, offsets)
    assert np.array_equal(store.matrix, values)
    ours, written = (json.loads((tmp_path / side / "info.json").read_text())
                     for side in ("ours", "theirs"))  # fmt: skip
    assert ours == written


def test_info_is_bergsons(tmp_path):
    create_index(tmp_path / "theirs", 3, SIZES, np.float16)
    write(tmp_path / "ours", matrix(3, np.float16))
    texts = [(tmp_path / side / "info.json").read_text() for side in ("ours", "theirs")]
    assert texts[0] == texts[1]


def test_an_older_store_names_its_format_elsewhere(tmp_path):
    folder = write(tmp_path / "store", matrix(3))
    info = json.loads((folder / "info.json").read_text())
    del info["base_dtype"], info["attribute_tokens"]
    info["dtype"] = {"formats": ["(6,)<f4", "(3,)<f4", "(1,)<f4"]}
    (folder / "info.json").write_text(json.dumps(info))
    assert GradientStore(folder).dtype == np.float32
    assert np.array_equal(load_gradients(folder), GradientStore(folder).matrix)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_numbers_beyond_the_format_are_cut_and_counted(tmp_path, dtype):
    largest = float(ml_dtypes.finfo(dtype).max)
    values = np.array([[1e300, -1e300] + [0.5] * 8])
    with GradientWriter(tmp_path, SIZES, np.dtype(dtype), 1) as writer:
        writer.write(0, values)
    assert writer.cut == 2
    found = GradientStore(tmp_path).matrix[0].astype(np.float64)
    assert found.tolist() == [largest, -largest] + [0.5] * 8


def test_rows_must_fit(tmp_path):
    with GradientWriter(tmp_path, SIZES, np.dtype(np.float32), 2) as writer:
        for row, values, module in [
            (2, np.zeros((1, 10)), None),
            (0, np.zeros((1, 11)), None),
            (0, np.zeros((1, 2)), "h.1.mlp"),
        ]:
            with pytest.raises(ValueError, match="does not lie in 2 x 10"):
                writer.write(row, values, module=module)
    with pytest.raises(ValueError, match="have 5 rows; expected 4"):
        GradientWriter(tmp_path, SIZES, np.dtype(np.float32), 4, counts=COUNTS)


def change_info(**values):
    def spoil(folder):
        info = json.loads((folder / "info.json").read_text()) | values
        (folder / "info.json").write_text(
            json.dumps({name: value for name, value in info.items() if value is not None})
        )

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "info.json").unlink(), "has no info.json; expected the folder of a"),
        (lambda f: (f / "info.json").write_text("{"), "info.json isn't JSON"),
        (lambda f: (f / "info.json").write_text("[]"), "has no table `grad_sizes`"),
        (change_info(grad_sizes=None), "has no table `grad_sizes`"),
        (change_info(grad_sizes={"a": -1}), "has no table `grad_sizes`"),
        (change_info(num_grads="5"), "`num_grads` is '5'"),
        (change_info(base_dtype="int8"), "`base_dtype` is 'int8'; expected one of float64"),
        (change_info(base_dtype=None), "`base_dtype` is None"),
        (change_info(num_grads=6), "has 200 bytes; expected 240, 6 rows of 10 float32"),
        (lambda f: (f / "gradients.bin").unlink(), "cannot read .*gradients.bin"),
        (lambda f: (f / "gradients.bin").write_bytes(b""), "has 0 bytes; expected 200"),
        (change_info(attribute_tokens=True), "cannot read .*offsets.npy"),
    ],
)
def test_what_is_missing_or_damaged_is_one_line(tmp_path, spoil, words):
    folder = write(tmp_path / "store", matrix(5))
    spoil(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        GradientStore(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        (np.array([0, 2, 4]), "doesn't divide 5 rows"),
        (np.array([0, 4, 2, 5]), "doesn't divide 5 rows"),
        (np.array([0.0, 5.0]), "holds no vector of whole numbers"),
        (None, "offsets.npy is damaged"),
    ],
)
def test_offsets_must_divide_the_rows(tmp_path, offsets, words):
    folder = write(tmp_path / "store", matrix(5), COUNTS)
    if offsets is None:
        (folder / "offsets.npy").write_bytes(b"nothing of numpy's")
    else:
        np.save(folder / "offsets.npy", offsets)
    with pytest.raises(CheckpointError, match=words):
        GradientStore(folder)
