"""Hostile and damaged torch files: nothing runs, nothing but `CheckpointError` comes out.

Two witnesses: a canary file that the payloads try to create, and Python's audit events for
processes, code, imports by a pickle, and files opened for writing. That the payloads are live
is shown by giving them to `pickle` itself.
"""

import io
import os
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch

from jhessians.errors import CheckpointError
from jhessians.interop import _safe_pickle, torchfile
from tests.interop.hostile_pickles import (
    INERT,
    live_payloads,
    number,
    numbers,
    storage,
    tensor,
    text,
)
from tests.interop.watching import only_reading


def read_all(path) -> None:
    for lazy in (False, True):
        value = torchfile.open_torch_file(path) if lazy else torchfile.load(path)
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, torchfile.LazyTensor):
                item.read()
            elif isinstance(item, dict | list | tuple):
                stack.extend(item.values() if isinstance(item, dict) else item)


def guarded_read(path) -> str | None:
    """Read a file under watch; the error's message, or None if it was read."""
    with only_reading():
        try:
            read_all(path)
            return None
        except CheckpointError as error:
            return str(error)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory) -> None:
    """Python imports codecs at their first use; that is not the file's doing."""
    path = tmp_path_factory.mktemp("warm") / "x.pt"
    path.write_bytes(rezip())
    read_all(path)


def assert_refused(path, because: str = "") -> None:
    message = guarded_read(path)
    assert message is not None, "a hostile file was read"
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400
    assert because in message, message


def write_zip(path, program: bytes, storages: dict[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/version", "3")
        for key, content in ({"0": bytes(16)} if storages is None else storages).items():
            archive.writestr(f"x/data/{key}", content)


class PlainUnpickler(pickle.Unpickler):
    def persistent_load(self, pid):
        return pid


@pytest.mark.parametrize("case", live_payloads(""))
def test_live_payloads_run_in_pickle_and_not_here(tmp_path, case):
    canary = tmp_path / "canary"
    program = live_payloads(str(canary))[case] + b"."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            PlainUnpickler(io.BytesIO(program)).load()
        except Exception:  # many fail once they have done their work
            pass
    assert canary.exists(), "the payload is a dud and would prove nothing"
    canary.unlink()

    zipped, legacy = tmp_path / "zip.pt", tmp_path / "legacy.pt"
    write_zip(zipped, program)
    torch.save([1], legacy, _use_new_zipfile_serialization=False)
    value = pickle.dumps([1], protocol=2)
    content = legacy.read_bytes()
    assert content.count(value) == 1
    legacy.write_bytes(content.replace(value, program))
    for path in (zipped, legacy):
        assert_refused(path)
        assert not canary.exists()


@pytest.mark.parametrize("case", INERT)
def test_hostile_programs_are_refused(tmp_path, case):
    path = tmp_path / "x.pt"
    write_zip(path, b"\x80\x02" + INERT[case] + b".")
    started = time.monotonic()
    tracemalloc.start()
    try:
        assert_refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 5
    assert peak < 64 * 2**20


def test_the_assembler_makes_good_files_too(tmp_path):
    # Otherwise every case above might be refused for a fault of its own.
    path = tmp_path / "x.pt"
    stored = np.arange(4, dtype=np.float32)
    write_zip(path, b"\x80\x02" + tensor() + b".", {"0": stored.tobytes()})
    assert guarded_read(path) is None
    assert torchfile.load(path).tolist() == stored.tolist()
    assert torch.load(path, weights_only=True).tolist() == stored.tolist()


def test_long_programs_are_cut_off(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    program = b"\x80\x02](" + b"N" * 1000 + b"e."
    write_zip(path, program)
    assert guarded_read(path) is None
    monkeypatch.setattr(_safe_pickle, "_MAX_INSTRUCTIONS", 1000)
    assert_refused(path, "more than 1000 instructions")
    monkeypatch.setattr(_safe_pickle, "MAX_PROGRAM_BYTES", len(program) - 1)
    assert_refused(path, "too large")


def test_expanded_tensors_are_read_within_the_limit(tmp_path):
    path = tmp_path / "x.pt"
    write_zip(path, b"\x80\x02" + tensor(shape=numbers([10]), strides=numbers([0])) + b".")
    assert guarded_read(path) is None


def test_strides_that_are_never_used_may_be_anything(tmp_path):
    path = tmp_path / "x.pt"
    for shape, strides in (([1, 4], [2**2000, 1]), ([0, 4], [2**2000, 2**2000])):
        program = tensor(shape=numbers(shape), strides=numbers(strides))
        write_zip(path, b"\x80\x02" + program + b".")
        assert guarded_read(path) is None
        assert torchfile.load(path).shape == tuple(shape)


def legacy_file(claimed: int, key: bytes, tail: bytes) -> bytes:
    """One float32 storage "0" that its tensor takes for `claimed` elements long."""
    content = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    content += pickle.dumps({"little_endian": True}, 2)
    content += b"\x80\x02" + tensor(of=storage(count=number(claimed) + b"N")) + b"."
    return content + b"\x80\x02]" + key + b"." + tail


LEGACY = {
    "good": (legacy_file(4, text("0") + b"a", struct.pack("<q", 4) + bytes(16)), None),
    "cut off": (legacy_file(4, text("0") + b"a", struct.pack("<q", 4) + bytes(15)), "cut off"),
    "no count": (legacy_file(4, text("0") + b"a", bytes(7)), "ends early"),
    "too long": (legacy_file(4, text("0") + b"a", struct.pack("<q", 4) + bytes(17)), "follow"),
    "other size": (legacy_file(5, text("0") + b"a", struct.pack("<q", 4) + bytes(16)), "differs"),
    "huge": (legacy_file(2**62, text("0") + b"a", struct.pack("<q", 2**62)), "cut off"),
    "no keys": (legacy_file(4, b"", struct.pack("<q", 4) + bytes(16)), "keys"),
    "key of a list": (legacy_file(4, b"]a", struct.pack("<q", 4) + bytes(16)), "keys"),
    "other key": (legacy_file(4, text("1") + b"a", struct.pack("<q", 4) + bytes(16)), "keys"),
    "key twice": (
        legacy_file(4, (text("0") + b"a") * 2, (struct.pack("<q", 4) + bytes(16)) * 2),
        "keys",
    ),
}


@pytest.mark.parametrize("case", LEGACY)
def test_hostile_legacy_files_are_refused(tmp_path, case):
    content, because = LEGACY[case]
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    if because is None:
        assert guarded_read(path) is None
        assert torchfile.load(path).tolist() == torch.load(path).tolist() == [0] * 4
    else:
        assert_refused(path, because)


def good_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(8.0), "b": torch.ones(3, dtype=torch.bfloat16)}, buffer)
    return buffer.getvalue()


def rezip(change=lambda name, content: [(name, content)], compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good_zip())) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        with zipfile.ZipFile(buffer, "w", compression) as target:
            for member in source.namelist():
                for new_name, content in change(member, source.read(member)):
                    target.writestr(new_name, content)
    return buffer.getvalue()


def directory_edit(suffix: str, offset: int, value: bytes) -> bytes:
    """Overwrite a field of one member's entry in the central directory."""
    content = bytearray(good_zip())
    at = content.index(b"PK\x01\x02")
    while not content[at + 46 : at + 46 + content[at + 28]].endswith(suffix.encode()):
        at = content.index(b"PK\x01\x02", at + 4)
    content[at + offset : at + offset + len(value)] = value
    return bytes(content)


def overlapping() -> bytes:
    """Two storages in the same bytes: each directory entry alone looks right."""
    content = good_zip()
    at = content.index(b"PK\x01\x02")
    while not content[at + 46 : at + 46 + content[at + 28]].endswith(b"data/0"):
        at = content.index(b"PK\x01\x02", at + 4)
    return directory_edit("data/1", 42, content[at + 42 : at + 46])


def also(extra_name: str):
    return lambda name, content: [(name, content)] + [(extra_name, b"x")] * name.endswith("pkl")


def write_header(position: int, value: bytes) -> bytes:
    content = bytearray(rezip())  # torch's own also says it all in a second, 64-bit record
    end = content.rindex(b"PK\x05\x06")
    content[end + position : end + position + len(value)] = value
    return bytes(content)


CONTAINERS = {
    "empty file": (b"", "empty"),
    "text": (b"hello world, this is no checkpoint", "not a file of torch.save"),
    "zeros": (bytes(4096), "not a file of torch.save"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not a file of torch.save"),
    "plain pickle": (pickle.dumps({"a": 1}, protocol=2), "not a file of torch.save"),
    "plain number": (pickle.dumps(2**70, protocol=2), "magic number"),
    "zip start only": (b"PK\x03\x04", "zip archive"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "no single data.pkl"),
    "no pickle": (rezip(lambda n, c: [] if n.endswith("pkl") else [(n, c)]), "no single"),
    "two pickles": (rezip(also("y/data.pkl")), "no single"),
    "pickle twice": (rezip(lambda n, c: [(n, c), (n, c)]), "twice"),
    "torchscript": (rezip(also("archive/constants.pkl")), "TorchScript"),
    "path traversal": (rezip(also("archive/../../evil")), "unsafe name"),
    "absolute path": (rezip(also("/etc/evil")), "unsafe name"),
    "backslash path": (rezip(also("archive\\..\\evil")), "unsafe name"),
    "compressed": (rezip(compression=zipfile.ZIP_DEFLATED), "compressed"),
    "zip bomb": (
        rezip(lambda n, c: [(n, bytes(2**24) if "data/" in n else c)], zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "trailing pickle": (rezip(lambda n, c: [(n, c + b"N" * n.endswith("pkl"))]), "bytes follow"),
    "storage missing": (rezip(lambda n, c: [] if n.endswith("data/1") else [(n, c)]), "missing"),
    "storage short": (rezip(lambda n, c: [(n, c[:-1])] if "data/1" in n else [(n, c)]), "bytes"),
    "huge member": (directory_edit("data/1", 20, b"\xf0\xff\xff\x7f" * 2), "overlaps"),
    "huge pickle": (directory_edit("data.pkl", 20, b"\xf0\xff\xff\x7f" * 2), "overlaps"),
    "two sizes": (directory_edit("data/1", 20, b"\x01"), "two sizes"),
    "encrypted": (directory_edit("data/1", 8, b"\x01"), "encrypted"),
    "overlapping storages": (overlapping(), "overlaps"),
    "member elsewhere": (directory_edit("data/1", 42, b"\x07\x00\x00\x00"), "not where"),
    "huge directory": (write_header(12, b"\xf0\xff\xff\x7f"), "zip archive"),
    "directory elsewhere": (write_header(16, b"\xf0\xff\xff\x7f"), "before the file"),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_hostile_containers_are_refused(tmp_path, case):
    content, because = CONTAINERS[case]
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert_refused(path, because)


def test_a_huge_directory_is_not_read(tmp_path):
    path = tmp_path / "x.pt"
    size = 2**28
    with path.open("wb") as file:  # sparse: takes no disk
        file.write(b"PK\x03\x04")
        file.seek(size)
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, size, 0, 0))
    tracemalloc.start()
    try:
        assert_refused(path, "directory is too large")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_places_that_are_no_file(tmp_path):
    secret = tmp_path / "secret.pt"
    for path, because in (
        (tmp_path / "missing.pt", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), ""),
        (tmp_path / "a\0b", ""),
        (tmp_path / "two\nlines", "No such file"),
    ):
        message = guarded_read(path)
        assert message is not None and because in message and "\n" not in message
    os.mkfifo(secret)
    assert_refused(secret, "it is a named pipe; expected an ordinary file")


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    legacy = io.BytesIO()
    torch.save({"a": torch.arange(8.0)}, legacy, _use_new_zipfile_serialization=False)
    for content in (good_zip(), legacy.getvalue()):
        for length in (*range(0, len(content), 1 + len(content) // 200), len(content) - 1):
            path.write_bytes(content[:length])
            assert_refused(path)


def fuzz_seeds() -> dict[str, bytes]:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    value = {
        "state": module.state_dict(),
        "parameter": module[0].weight,
        "bool": torch.tensor([True, False]),
        "unsigned": torch.zeros(2, dtype=torch.uint16),
        "plain": [1, 2.5, None, "text", (True, 2**40)],
    }
    seeds = {}
    for label, options in {
        "zip": {}, "protocol 5": {"pickle_protocol": 5},
        "legacy": {"_use_new_zipfile_serialization": False},
    }.items():  # fmt: skip
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        seeds[label] = buffer.getvalue()
    return seeds


OPCODES = b"()]}NKMJGXUcRbQqrhjtaesu0.2oiPIS" + bytes(range(0x80, 0x99))


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        at = int(random.integers(0, len(changed)))
        kind = random.integers(0, 6)
        if kind == 0:
            changed[at] ^= 1 << int(random.integers(0, 8))
        elif kind == 1:
            changed[at] = int(random.integers(0, 256))
        elif kind == 2:
            changed[at:at] = bytes([OPCODES[random.integers(0, len(OPCODES))]])
        elif kind == 3:
            del changed[at : at + int(random.integers(1, 9))]
        elif kind == 4:
            source = int(random.integers(0, len(changed)))
            changed[at:at] = changed[source : source + int(random.integers(1, 33))]
        else:
            changed[at : at + 4] = random.choice([b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(4)])
        if not changed:
            break
    return bytes(changed[: int(random.integers(1, len(changed)))] if random.random() < 0.05
                 and len(changed) > 1 else changed)  # fmt: skip


def test_mutated_files_give_a_value_or_a_checkpoint_error(tmp_path):
    """2,100 files: two thirds mutated anywhere, a third in the pickle of a whole archive."""
    random = np.random.default_rng(20240607)
    path = tmp_path / "x.pt"
    seeds = fuzz_seeds()
    read = refused = 0
    reasons = set()
    for turn in range(2100):
        label = list(seeds)[turn % 3]
        content = seeds[label]
        if label == "legacy" or turn % 2:
            content = mutate(content, random)
        else:
            with zipfile.ZipFile(io.BytesIO(content)) as source:
                program = source.read("archive/data.pkl")
                storages = {
                    member.removeprefix("archive/data/"): source.read(member)
                    for member in source.namelist()
                    if member.startswith("archive/data/")
                }
            buffer = io.BytesIO()
            write_zip(buffer, mutate(program, random), storages)
            content = buffer.getvalue()
        path.write_bytes(content)
        message = guarded_read(path)
        read += message is None
        refused += message is not None
        if message is not None:
            assert "\n" not in message
            reasons.add(message.removeprefix(f"{path}: ")[:24])
    # Both outcomes, and many ways to fail: else the mutations would not reach the machine.
    # torch writes a random identifier into each seed, so the counts vary from run to run.
    assert read > 50 and refused > 1000 and len(reasons) > 40, (read, refused, len(reasons))
