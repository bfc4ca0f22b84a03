"""safetensors files: any part of a tensor, the library's own files, damage named in one line."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jhessians.errors import CheckpointError
from jhessians.interop.safetensors_file import DTYPES, open_safetensors, write_safetensors


def write(path, values):
    kinds = {name: (value.shape, value.dtype) for name, value in values.items()}
    write_safetensors(path, kinds, values.values())


def test_a_part_of_a_tensor(tmp_path):
    """Every way of cutting one to three axes, against numpy's own slices."""
    random = np.random.default_rng(0)
    values = {
        "none": random.random(()),
        "one": random.random(7),
        "two": random.random((5, 6)).astype(ml_dtypes.bfloat16),
        "three": random.random((3, 4, 5), np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / "model.safetensors"
    write(path, values)
    stored = open_safetensors(path)
    for name, value in values.items():
        assert stored[name].read().tobytes() == value.tobytes()
        for _ in range(50):
            index = tuple(
                slice(*np.sort(random.integers(0, n + 1, 2)).tolist())
                if random.random() < 0.6 else slice(None)
                for n in value.shape
            )  # fmt: skip
            part = stored[name].read_slice(index)
            assert part.shape == value[index].shape and part.dtype == value.dtype, index
            assert part.tobytes() == value[index].tobytes(), index


@pytest.mark.parametrize("code", DTYPES)
def test_the_library_and_we_write_and_read_the_same(tmp_path, code):
    """Also names beyond ASCII, and tensors without values between others."""
    values = np.arange(6).reshape(2, 3).astype(DTYPES[code])
    tensors = {"ü": values, "none": values[:0], "last": np.array(values[0, 0])}
    write(tmp_path / "ours", tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        found = open_safetensors(tmp_path / name)
        assert {n: t.read().tobytes() for n, t in found.items()} == {
            n: t.tobytes() for n, t in tensors.items()
        }
        assert all(found[n].dtype == t.dtype and found[n].shape == t.shape
                   for n, t in tensors.items())  # fmt: skip
        with safetensors.safe_open(tmp_path / name, "np") as theirs:
            assert list(found) == list(theirs.offset_keys())
            assert {theirs.get_slice(n).get_dtype() for n in tensors} == {code}


def raw(header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start=0, end=4, *, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


DAMAGED = {
    "empty": b"",
    "no header": b"\x08\0\0",
    "longer header than file": raw({}, length=100),
    "absurd header": raw({}, length=2**62),
    "not JSON": raw(b"{]"),
    "nested without end": raw(b"[" * 100_000),
    "not a table": raw([1]),
    "an entry that is none": raw({"m": 3}, bytes(4)),
    "an entry without offsets": raw({"m": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "nested 20,000 deep": raw(b'{"m":' * 20_000 + b"1" + b"}" * 20_000),
    "half a number": raw({"m": entry(shape=[1.5])}, bytes(4)),
    "truth instead of a number": raw({"m": entry(shape=[True])}, bytes(4)),
    "words instead of numbers": raw({"m": entry(shape="1")}, bytes(4)),
    "an offset with a fraction": raw({"m": entry(0, 4.0)}, bytes(4)),
    "a number beyond 64 bits": raw({"m": entry(shape=[0, 10**30])}, bytes(0)),
    "a number without end": raw(b'{"m": {"shape": [' + b"9" * 5000 + b"]}}"),
    "metadata that are no words": raw({"__metadata__": {"format": 1}}),
    "metadata that are no table": raw({"__metadata__": "pt"}),
    "two bytes a character": raw("{}".encode("utf-16")),
    "below zero": raw({"m": entry(shape=[-1])}, bytes(4)),
    "before the data": raw({"m": entry(-4, 0)}, b""),
    "size that contradicts the shape": raw({"m": entry(0, 8)}, bytes(8)),
    "unheard-of dtype": raw({"m": entry(dtype="F31")}, bytes(4)),
    "a dtype that is no word": raw({"m": entry(dtype=[])}, bytes(4)),
    "cut short": raw({"m": entry()}, bytes(3)),
    "something behind": raw({"m": entry()}, bytes(5)),
    "overlap": raw({"m": entry(), "n": entry(2, 6)}, bytes(6)),
    "the same place": raw({"m": entry(), "n": entry()}, bytes(4)),
    "gap": raw({"m": entry(), "n": entry(8, 12)}, bytes(12)),
    "a gap in front": raw({"m": entry(4, 8)}, bytes(8)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_said_in_one_line(tmp_path, case):
    """Of every file that the library refuses, too."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(CheckpointError, match="m.safetensors") as error:
        open_safetensors(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "np") as file:
        file.keys()


def test_names_from_a_file_do_not_reach_the_terminal_raw(tmp_path):
    """Neither escape codes nor line breaks, and nothing without end."""
    for name in ("\x1b[2J", "two\nlines", "x" * 9999, "\ud800"):
        path = tmp_path / "m.safetensors"
        path.write_bytes(raw({name: entry(dtype=[["\x1b[2J"] * 9999])}, bytes(4)))
        with pytest.raises(CheckpointError) as error:
            open_safetensors(path)
        assert str(error.value).isprintable() and len(str(error.value)) < 900


def test_axes_that_no_memory_holds(tmp_path):
    """The library takes them, but numpy makes no array of this shape."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw({"m": entry(0, 0, shape=[0, 2**40, 2**40])}))
    with pytest.raises(CheckpointError, match="m has the shape"):
        open_safetensors(path)


def test_a_name_twice(tmp_path):
    path = tmp_path / "m.safetensors"
    one = json.dumps(entry()).encode()
    path.write_bytes(raw(b'{"m": ' + one + b', "m": ' + one + b"}", bytes(4)))
    with pytest.raises(CheckpointError, match="names m twice"):
        open_safetensors(path)


def test_a_file_that_shrinks_or_goes(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, {"m": np.ones(3)})
    tensor = open_safetensors(path)["m"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="became shorter"):
        tensor.read()
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        tensor.read()
    with pytest.raises(CheckpointError, match="No such file"):
        open_safetensors(path)
