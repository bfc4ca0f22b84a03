"""What statistics and eigendecompositions take, and how much memory all hosts have free."""

import ctypes
import math
import os
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np

from jhessians.linalg.eigen import usable_cores
from jhessians.linalg.symmetric import packed_shapes
from jhessians.protocol import Site

EIGENDECOMPOSITION = 44
"""Bytes of an eigendecomposition for each entry of its matrix, as measured: float32 in, and float64
for the matrix, numpy's copy, LAPACK's workspace of two more, and the eigenvectors."""

SHARE = 0.5
"""Of a host's free memory, what eigendecompositions may take that go on side by side."""


def factor_numbers(site: Site) -> int:
    """Numbers in a linear's covariances, their eigenvectors and its corrected eigenvalues."""
    sides = [site.out_features, *([site.inputs] if site.owns_input else [])]
    factors = sum(d * d + sum(math.prod(shape) for shape in packed_shapes(d)) for d in sides)
    return factors + site.out_features * site.inputs


def gram_numbers(site: Site, projection_dim: int) -> int:
    """Numbers in the dense Grams of a linear's gradients, of all its modules.

    Args:
        site: The linear.
        projection_dim: p of a projected gradient [p, p]; 0 if they are whole.
    """
    row = projection_dim**2 or site.out_features * site.inputs
    return row**2 * len(site.slots)


def eigendecompositions_at_once(dimension: int) -> int:
    """How many matrices of so many rows each host may eigendecompose side by side.

    One for each core, or as many as there is memory for: fewest of all hosts, which take turns.
    """
    fit = SHARE * _free_on_host() / (EIGENDECOMPOSITION * dimension**2)
    return max(1, _fewest_of_hosts(min(usable_cores(), int(fit))))


def free_memory() -> int:
    """Bytes that are free on each device: the fewest of all hosts, which so decide alike."""
    return _fewest_of_hosts(_free_on_device())


def _fewest_of_hosts(count: int) -> int:
    if jax.process_count() == 1:
        return count
    from jax.experimental import multihost_utils

    # Without 64 bits JAX has no integer that is wide enough; seven digits are plenty.
    return int(multihost_utils.process_allgather(np.float32(count)).min())


def _free_on_device() -> int:
    """Bytes that are free on each of this host's devices."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return _free_on_host() // jax.local_device_count()


def _free_on_host() -> int:
    """Bytes that the kernel could give this process, or those that a container may have."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # macOS says only how many there are
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    table = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(table["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and (allowed := limit.read_text().strip()) != "max":
        free = min(free, int(allowed) - int(used.read_text()))
    return max(free, 1)


def return_freed_memory() -> None:
    """Give back to the system what is free in the C library's heap, where that is glibc's.

    Of what a compilation takes much stays there, in pieces: 300 MB for a small model, a quarter of
    the process's largest size.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
