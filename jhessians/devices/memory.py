"""How much memory devices and hosts have free."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np


def free_memory() -> int:
    """Bytes that are free on each device: the least over all hosts, so that all decide alike."""
    return fewest_of_hosts(_free_on_device())


def fewest_of_hosts(count: int) -> int:
    """The smallest of all hosts' numbers, to seven digits."""
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
    return free_on_host() // jax.local_device_count()


def free_on_host() -> int:
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

    After a compilation much freed memory stays in that heap: 300 MB for a small model, a quarter of
    the process's largest size.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
