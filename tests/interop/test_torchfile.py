"""Torch files read and written without torch, against torch itself."""

import tracemalloc
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from jhessians.errors import CheckpointError, OutputError
from jhessians.interop import torchfile

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.uint64: np.uint64,
    torch.bool: np.bool_,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
}
SHAPES = [(), (1,), (5,), (0,), (0, 3), (2, 0), (2, 3), (3, 1, 4)]
FORMATS = [{}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The values' bytes in C order, by torch alone (numpy knows no bfloat16 of torch's)."""
    return bytes(tensor.detach().contiguous().clone().untyped_storage())


def assert_same(array: np.ndarray, tensor: torch.Tensor) -> None:
    assert isinstance(array, np.ndarray)
    assert array.dtype == DTYPES[tensor.dtype]
    assert array.shape == tuple(tensor.shape)
    assert array.tobytes() == raw_bytes(tensor)


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = {}
    for shape in SHAPES:
        values = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator)
        made[str(shape)] = values.to(torch.float32).to(dtype)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=["zip", "protocol5", "legacy"])
def test_reads_what_torch_writes(tmp_path, dtype, options):
    wanted = tensors(dtype)
    path = tmp_path / "model.pt"
    torch.save(wanted, path, **options)
    eager, lazy = torchfile.load(path), torchfile.open_torch_file(path)
    assert list(eager) == list(lazy) == list(wanted)
    for name, tensor in wanted.items():
        assert_same(eager[name], tensor)
        assert lazy[name].shape == tuple(tensor.shape)
        assert lazy[name].dtype == DTYPES[dtype]
        assert_same(lazy[name].read(), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_reads_what_we_write(tmp_path, dtype):
    path = tmp_path / "model.pt"
    wanted = tensors(dtype)
    numpy_dtype = np.dtype(DTYPES[dtype])
    arrays = {
        name: np.frombuffer(raw_bytes(tensor), numpy_dtype).reshape(tuple(tensor.shape))
        for name, tensor in wanted.items()
    }
    torchfile.save(arrays, path)
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert list(found) == list(wanted)
        for name, tensor in wanted.items():
            assert found[name].dtype == dtype
            assert found[name].shape == tensor.shape
            assert found[name].stride() == tensor.stride()
            assert raw_bytes(found[name]) == raw_bytes(tensor)
    for name, array in torchfile.load(path).items():
        assert_same(array, wanted[name])


STRUCTURE = OrderedDict(
    numbers=[0, 1, -1, 255, 65536, 2**31 - 1, -(2**31), 2**31, 2**63, -(2**63), 3**100],
    floats=(0.0, -0.0, 1.5, float("inf"), 1e-300),
    flags=[True, False, None],
    text=["", "plain", "Ä∂\n\0𝛌"],
    empty=[{}, [], (), OrderedDict()],
    nested={"a": ({"b": [("c",)]},)},
    keys={1: "i", "s": 1, None: 2, False: 3, 2.5: 4, -(2**40): 5},
)


def exact(value):
    """Types beside values, so that 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return type(value), [(exact(key), exact(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [exact(item) for item in value]
    return type(value), repr(value)


def test_structure_survives_both_ways(tmp_path):
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.pt"
    torchfile.save(STRUCTURE, ours)
    assert exact(torch.load(ours, weights_only=True)) == exact(STRUCTURE)
    assert exact(torchfile.load(ours)) == exact(STRUCTURE)
    for options in FORMATS:
        torch.save(STRUCTURE, theirs, **options)
        assert exact(torchfile.load(theirs)) == exact(STRUCTURE)


def test_total_processed_is_a_0d_int64_tensor(tmp_path):
    path = tmp_path / "total_processed.pt"
    for value in (np.array(12345), np.int64(12345)):
        torchfile.save(value, path)
        found = torch.load(path, weights_only=True)
        assert found.dtype == torch.int64 and found.shape == () and found.item() == 12345
    torch.save(torch.tensor(12345), path)
    found = torchfile.load(path)
    assert found.dtype == np.int64 and found.shape == () and found == 12345


def test_jax_big_endian_strided_and_shared_arrays_are_saved(tmp_path):
    path = tmp_path / "x.pt"
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    value = {
        "jax": jnp.arange(3, dtype=jnp.bfloat16),
        "big": grid.astype(">f4"),
        "transposed": grid.T,
        "reversed": grid[::-1, ::2],
        "twice": [grid, grid],
    }
    torchfile.save(value, path)
    found = torch.load(path, weights_only=True)
    assert found["jax"].dtype == torch.bfloat16 and found["jax"].tolist() == [0, 1, 2]
    assert found["big"].tolist() == grid.tolist()
    assert found["transposed"].tolist() == grid.T.tolist()
    assert found["reversed"].tolist() == grid[::-1, ::2].tolist()
    first, second = found["twice"]
    assert first.data_ptr() == second.data_ptr() and second.tolist() == grid.tolist()


@pytest.mark.parametrize("options", FORMATS, ids=["zip", "protocol5", "legacy"])
def test_views_and_shared_storages(tmp_path, options):
    path = tmp_path / "views.pt"
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    wanted = {
        "base": base,
        "transposed": base.T,
        "rows": base[2:4],
        "columns": base[:, 3:9:2],
        "permuted": base.reshape(5, 3, 4).permute(2, 0, 1),
        "diagonal": base.diagonal(),
        "element": base[4, 11],
        "none": base[3:3],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 7),
        "one": base[1:2, :1].expand(1, 1),
    }
    torch.save(wanted, path, **options)
    eager, lazy = torchfile.load(path), torchfile.open_torch_file(path)
    for name, tensor in wanted.items():
        assert_same(eager[name], tensor)
        read = lazy[name].read()
        assert_same(read, tensor)
        assert read.flags.c_contiguous and read.flags.writeable
    assert np.shares_memory(eager["base"], eager["transposed"])


def test_state_dict_and_parameters(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3, bias=False)
    )
    module[2].weight = torch.nn.Parameter(module[0].weight.detach().T)
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.tag = "kept by torch"  # type: ignore[attr-defined]
    state = module.state_dict()
    assert state._metadata  # the BUILD that is to be tolerated
    for options in FORMATS:
        path = tmp_path / "pytorch_model.bin"
        saved = {"state": state, "parameters": list(module.parameters()), "tag": attributed}
        torch.save({**saved, "size": torch.Size([2, 3])}, path, **options)
        found = torchfile.load(path)
        assert type(found["state"]) is OrderedDict and list(found["state"]) == list(state)
        for name, tensor in state.items():
            assert_same(found["state"][name], tensor)
        for array, tensor in zip(found["parameters"], module.parameters(), strict=True):
            assert_same(array, tensor)
        assert_same(found["tag"], attributed)
        assert found["size"] == (2, 3) and type(found["size"]) is tuple


def test_our_state_dict_loads_into_a_module(tmp_path):
    module = torch.nn.Linear(3, 2)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    torchfile.save(OrderedDict(weight=weight, bias=np.ones(2, np.float32)), tmp_path / "m.pth")
    module.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))
    assert module.weight.tolist() == weight.tolist()


def test_same_value_same_bytes(tmp_path):
    value = {"a": np.arange(100.0), "b": [1, "x"]}
    torchfile.save(value, tmp_path / "first.pt")
    torchfile.save(value, tmp_path / "other name.pth")
    assert (tmp_path / "first.pt").read_bytes() == (tmp_path / "other name.pth").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first.pt", "other name.pth"]


def test_storages_are_aligned_and_checksummed(tmp_path):
    path = tmp_path / "x.pt"
    torchfile.save([np.arange(size, dtype=np.uint8) for size in (1, 7, 100)], path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for tensor in torchfile.open_torch_file(path):
            assert tensor._extent.start % 64 == 0


def test_storages_beyond_the_32_bit_zip_format(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # instead of writing 2 GiB
    value = [np.arange(count, dtype=np.int64) for count in (3, 200, 5, 300)]
    torchfile.save(value, path)
    assert path.read_bytes().count(b"PK\x06\x06") == 1  # the 64-bit end record
    found = torch.load(path, weights_only=True)
    for lazy, tensor, array in zip(torchfile.open_torch_file(path), found, value, strict=True):
        assert lazy._extent.start % 64 == 0
        assert lazy.read().tolist() == tensor.tolist() == array.tolist()


def peak_of(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_lazy_reading_and_streamed_copying_hold_one_tensor(tmp_path):
    path, copy = tmp_path / "large.bin", tmp_path / "copy.bin"
    count = 2**20
    torch.save({str(i): torch.full((count,), float(i)) for i in range(16)}, path)  # 64 MiB
    peaks = [
        peak_of(lambda: torchfile.open_torch_file(path)),
        peak_of(lambda: torchfile.open_torch_file(path)["7"].read()),
        peak_of(lambda: torchfile.save(torchfile.open_torch_file(path), copy)),
        peak_of(lambda: torchfile.load(path)),
    ]
    tensor = count * 4
    # The bounds leave 1 MiB for the directory and the pickle. The last line shows that the
    # measure sees numpy's memory at all.
    assert peaks[0] < 2**20
    assert peaks[1] < tensor + 2**20
    assert peaks[2] < 2 * tensor + 2**20
    assert peaks[3] > 16 * tensor
    copied = torch.load(copy, weights_only=True)
    assert all(bool((copied[str(i)] == i).all()) for i in range(16))


def test_a_slice_is_read_without_the_rest_of_its_storage(tmp_path):
    path = tmp_path / "large.bin"
    torch.save(torch.arange(2**22, dtype=torch.float32).reshape(4096, 1024)[100:102], path)
    lazy = torchfile.open_torch_file(path)
    assert lazy.read()[1, 3] == 101 * 1024 + 3
    assert peak_of(lazy.read) < 2**18


def test_a_file_replaced_after_opening_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torchfile.save(np.arange(4.0), path)
    lazy = torchfile.open_torch_file(path)
    torchfile.save(np.arange(5.0), path)
    with pytest.raises(CheckpointError, match="has changed"):
        lazy.read()
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        lazy.read()


def test_big_endian_files_are_refused(tmp_path):
    path, big = tmp_path / "x.pt", tmp_path / "big.pt"
    torchfile.save({"a": np.arange(4.0)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(big, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"big" if name.endswith("byteorder") else source.read(name))
    with pytest.raises(CheckpointError, match="byte order 'big'"):
        torchfile.load(big)
    torch.save(torch.ones(2), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    flag = content.index(b"little_endian") + len(b"little_endian") + 2
    assert content[flag : flag + 1] == b"\x88"
    big.write_bytes(content[:flag] + b"\x89" + content[flag + 1 :])
    with pytest.raises(CheckpointError, match="little-endian"):
        torchfile.load(big)


def test_bytes_other_than_0_and_1_are_true(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.tensor([0, 1, 7], dtype=torch.uint8).view(torch.bool), path)
    for found in (torchfile.load(path), torchfile.open_torch_file(path).read()):
        assert found.tobytes() == b"\0\1\1"


@pytest.mark.parametrize("member", ["data.pkl", "byteorder", "data/0"])
def test_checksums_are_compared(tmp_path, member):
    """A flipped bit in whatever is read; torch itself doesn't notice."""
    path = tmp_path / "x.pt"
    torch.save({"whole": torch.arange(6.0), "part": torch.arange(8.0)[2:5]}, path)
    good = torchfile.load(path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"x/{member}")
    names = content[info.header_offset + 26 : info.header_offset + 30]
    start = info.header_offset + 30 + int(np.frombuffer(names, "<u2").sum())
    # The last byte of what is stored, but of a pickle the sign of a tensor's offset.
    at = content.index(b"K\x00", start) if member == "data.pkl" else start + info.file_size - 1
    content[at + (member == "data.pkl")] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: .* another checksum"):
        torchfile.load(path)
    with pytest.raises(CheckpointError, match="is damaged: .* another checksum"):
        torchfile.open_torch_file(path)["whole"].read()
    assert list(good["part"]) == [2, 3, 4]


def test_a_part_of_a_storage_is_compared_with_all_of_it(tmp_path, monkeypatch):
    """Also if the damage lies in another part; and each storage once, in pieces."""
    monkeypatch.setattr(torchfile, "_CHUNK_BYTES", 24)
    path = tmp_path / "x.pt"
    whole = torch.arange(100.0)
    torch.save({"first": whole[:10], "second": whole[10:20]}, path)
    found = torchfile.open_torch_file(path)
    assert list(found["second"].read()) == list(range(10, 20))
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(90.0, 100.0, dtype="<f4").tobytes())] ^= 1
    path.write_bytes(content)
    for name in ("first", "second"):
        with pytest.raises(CheckpointError, match="another checksum"):
            torchfile.open_torch_file(path)[name].read()


def test_files_without_checksums_are_read(tmp_path):
    """torch can leave them all at zero; one alone that is zero is damage."""
    path = tmp_path / "x.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.arange(5.0), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert list(torchfile.load(path)) == [0, 1, 2, 3, 4]
    torch.save(torch.arange(5.0), path)
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo("x/data/0").CRC.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(crc, bytes(4)))
    with pytest.raises(CheckpointError, match="another checksum"):
        torchfile.load(path)


def test_conjugate_views_are_refused_rather_than_read_wrongly(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.tensor([1 + 2j]).conj(), path)
    with pytest.raises(CheckpointError, match="view flags"):
        torchfile.load(path)


def itself() -> list:
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), TypeError),
        ({1, 2}, TypeError),
        (b"bytes", TypeError),
        (np.array(["text"]), TypeError),
        (np.array([object()]), TypeError),
        (np.zeros(2, np.longdouble), TypeError),
        (torch.ones(2), TypeError),
        (torch.float32, TypeError),
        (itself(), ValueError),
        (2**3000, ValueError),
        ({(1, 2): 3}, ValueError),
        ({2**70: 3}, ValueError),
        ("\ud800", ValueError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_torch_could_not_read_is_not_written(tmp_path, value, error):
    with pytest.raises(error):
        torchfile.save({"a": [value]} if not isinstance(value, dict) else value, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_an_output_error(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for path in (tmp_path / "missing" / "x.pt", tmp_path / "folder.pt"):
        with pytest.raises(OutputError, match="can't be written"):
            torchfile.save([1], path)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.pt"]
