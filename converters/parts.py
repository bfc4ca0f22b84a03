"""Hashes by which hosts find out that they read the same weights, of which each has only a part.

A host hashes the part that its devices hold, and the next host's part as its own files have it. If
every host's first hash is the second of the host before, the parts belong together.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhessians.devices.fingerprint import sums_of_bits
from jhessians.devices.offloading import is_in_host


class Parts:
    """What a host's part and the next one's are known by, tensor by tensor.

    Args:
        wanted: Whether to look at anything; with one host nothing is looked at anyway.
    """

    def __init__(self, wanted: bool):
        self._wanted = wanted and jax.process_count() > 1
        self._mine, self._of_next = hashlib.sha256(), hashlib.sha256()
        self._unread, self._words = False, ""

    def add(self, array: jax.Array, read: Callable[[Any], np.ndarray] | None = None) -> None:
        """Take in a tensor.

        Args:
            array: On the devices of all hosts, or of this one.
            read: Reads a part of it, by slices, from this host's files; None where they can't be
                read in parts, so that a tensor's parts on other hosts aren't compared.
        """
        if not self._wanted:
            return
        host, hosts = jax.process_index(), jax.process_count()
        mine = _slices(array, host)
        of_next = mine if array.is_fully_addressable else _slices(array, (host + 1) % hosts)
        if mine != of_next and read is None:
            self._unread = True
            return
        here = {_key(shard.index, array.shape): shard.data for shard in array.addressable_shards}
        # What lies in host memory is a stack that may be too large for a device.
        known = _known_by_entry if is_in_host(array) else _known
        sums = [known(here[key]) for key in mine]
        self._mine.update(b"".join(sums))
        if mine != of_next:
            assert read is not None
            sums = [known(read(index)) for index in of_next.values()]
        self._of_next.update(b"".join(sums))

    def know(self, words: str) -> None:
        """Say what the files are known by, for tensors that can't be read in parts."""
        self._words = words

    def hashes(self) -> tuple[str, str]:
        """Of this host's part, and of the next one's."""
        if self._unread:
            self._mine.update(self._words.encode())
            self._of_next.update(self._words.encode())
        return self._mine.hexdigest(), self._of_next.hexdigest()


def _slices(array: jax.Array, host: int) -> dict[Any, Any]:
    """The different parts of an array that a host's devices hold, in order."""
    indices: Mapping[Any, Any] = array.sharding.devices_indices_map(array.shape)
    found = {_key(index, array.shape): index
             for device, index in indices.items() if device.process_index == host}  # fmt: skip
    return dict(sorted(found.items()))


def _key(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """A part, so that equal ones are equal."""
    bounds = [each.indices(size) for each, size in zip(index, shape, strict=True)]
    return tuple((start, stop) for start, stop, _ in bounds)


def _known_by_entry(stack: jax.Array | np.ndarray) -> bytes:
    return b"".join(map(_known, np.asarray(stack)))


def _known(part: jax.Array | np.ndarray) -> bytes:
    """A hash of a part, made where it lies; all hosts have one kind of devices."""
    if jax.default_backend() == "cpu":  # nothing is copied, and nothing compiled
        whole = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        digest = hashlib.sha256(repr(part.shape).encode())
        digest.update(whole.data)
        return digest.digest()
    return np.asarray(sums_of_bits(jnp.asarray(part))).tobytes()
