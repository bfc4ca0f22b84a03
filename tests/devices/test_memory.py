"""How much memory is free."""

import os
from pathlib import Path

import jax
import numpy as np

from jhessians.devices import memory


def test_free_memory_is_that_of_the_host():
    free = memory.free_memory()
    assert 1 << 20 < free < 1 << 50
    assert jax.local_device_count() * free < 1 << 50


def test_free_memory_is_that_of_the_poorest_host(monkeypatch):
    gather = "jax.experimental.multihost_utils.process_allgather"
    monkeypatch.setattr(memory, "_free_on_device", lambda: 5 << 30)
    assert memory.free_memory() == 5 << 30
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(gather, lambda mine: np.stack([mine, np.float32(3 << 30), mine]))
    assert memory.free_memory() == 3 << 30


def test_without_linux_all_memory_counts_as_free(monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda path: Path("/nowhere") / path.lstrip("/"))
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    assert memory.free_memory() == pages * size // jax.local_device_count()
