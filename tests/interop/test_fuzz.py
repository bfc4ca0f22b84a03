"""Files of every kind, damaged at random: each reader gives a value or an error in one line.

Nothing else is raised, nothing is executed, written or connected to, and neither time nor memory
runs away. The short version is the beginning of the long one.
"""

import io
import re
import shutil
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from jhessians.errors import UserError
from jhessians.interop.manifest import MANIFEST
from tests.interop.readers import READERS, finish
from tests.interop.watching import only_reading

SECONDS, BYTES = 1.0, 64 << 20
"""Most processor time and memory of one read; these files have some kilobytes."""

NUMBERS = [b"-1", b"0", b"1e999", b"-1e999", b"NaN", b"1.5", b"null", b"true", b'"7"', b"[]", b"{}",
           b"9" * 19, b"9" * 30, b"9" * 5000, b"4294967295", b"0.1e1"]  # fmt: skip
TOKENS = [b"[" * 20_000, b'{"a":' * 20_000, b"- " * 300, b"\xff\xfe", b"\x1b[2J", b"\0", b"\n",
          b"*a", b"&a [*a, *a]", b"!!python/object/apply:os.system ['true']", b"!!int ''",
          b"2024-99-99", b"? ", b"1:1:1", b'"', b"\\ud800", b"..", b"/etc/passwd"]  # fmt: skip


def mutate(content: bytes, random: np.random.Generator, others: list[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        if not changed:
            break
        at = int(random.integers(0, len(changed)))
        count = int(2 ** random.uniform(0, 8))
        match random.integers(0, 10):
            case 0:
                changed[at] ^= 1 << int(random.integers(0, 8))
            case 1:
                changed[at : at + count] = random.bytes(count)
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + count]
            case 4:
                changed[at : at + count] = bytes(min(count, len(changed) - at))
            case 5:  # a splice, from here or from another file
                source = others[random.integers(0, len(others))]
                start = int(random.integers(0, len(source) + 1))
                changed[at : at + count * int(random.integers(0, 2))] = source[start:][:count]
            case 6 | 7:  # a number of a text
                found = list(re.finditer(rb"-?\d+(\.\d+)?", changed))
                if found:
                    place = found[random.integers(0, len(found))]
                    changed[slice(*place.span())] = NUMBERS[random.integers(0, len(NUMBERS))]
            case 8:
                changed[at:at] = TOKENS[random.integers(0, len(TOKENS))]
            case _:  # a length of a binary format
                width = int(random.choice([2, 4, 8]))
                start = int(random.choice([0, at]))
                value = int(random.choice([0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 2)]))
                changed[start : start + width] = value.to_bytes(width, "little")
    return bytes(changed)


def with_new_checksums(content: bytes, random: np.random.Generator, others: list[bytes]) -> bytes:
    """A torch file of which one member is damaged, so that more than its checksum is looked at."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(result, "w") as target:
        names = source.namelist()
        chosen = names[random.integers(0, 2 if random.random() < 0.8 else len(names))]
        for name in names:
            data = source.read(name)
            target.writestr(name, mutate(data, random, others) if name == chosen else data)
    return result.getvalue()


def read(reader, folder) -> str | None:
    """What a reader says of a folder; None if it reads it."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with only_reading():
            reader.read(folder)
        return None
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 900, error
        return str(error).replace(str(folder), "")
    finally:
        spent, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert spent < SECONDS and peak < BYTES, (spent, peak)


def fuzz(folder, turns: int) -> tuple[int, set[str]]:
    """Damage one file after the other; how many were read all the same, and what was said."""
    files = {}
    for name, reader in READERS.items():
        finish(reader, folder / name)
        reader.read(folder / name)  # imports what it needs, which is not the files' doing
        assert read(reader, folder / name) is None
        for path in sorted(folder.joinpath(name).rglob("*")):
            if path.is_file():
                files[path] = name, path.read_bytes()
    places = list(files)
    contents = [content for _, content in files.values()]
    intact, said = 0, set()
    for turn in range(turns):
        random = np.random.default_rng([20261126, turn])
        path = places[turn % len(places)]
        name, content = files[path]
        change = mutate
        if content[:2] == b"PK" and random.random() < 0.7:
            change = with_new_checksums
        path.write_bytes(change(content, random, contents))
        manifest = folder / name / MANIFEST
        if path != manifest and random.random() < 0.8:
            manifest.unlink()  # its sizes would say it all
        try:
            message = read(READERS[name], folder / name)
        except BaseException:
            shutil.copy(path, kept := folder / "damaged")
            print(f"turn {turn}: {name}, {path.name}, kept as {kept}")
            raise
        path.write_bytes(content)
        manifest.write_bytes(files[manifest][1])
        intact += message is None
        if message is not None:
            said.add(re.sub(r"[\d,]+|'.*'", "", message)[:60])
    return intact, said


@pytest.mark.timeout(300)
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    intact, said = fuzz(tmp_path, 300)
    assert 10 < intact < 200 and len(said) > 60, (intact, len(said))


@pytest.mark.slow
def test_many_damaged_files(tmp_path):
    intact, said = fuzz(tmp_path, 2000)
    assert 100 < intact < 1300 and len(said) > 200, (intact, len(said))
