"""How many eigendecompositions run side by side."""

import jax
import numpy as np
from threadpoolctl import threadpool_info

from jhessians.fitting import eigensolver, memory


def test_eigendecompositions_are_as_many_as_cores_or_memory_allow(monkeypatch):
    monkeypatch.setattr(memory, "usable_cores", lambda: 16)
    monkeypatch.setattr(memory, "free_on_host", lambda: 64 << 30)
    assert memory.eigendecompositions_at_once(4096) == 16
    # 28,672 rows: 36 GB each, and half of what is free may be taken.
    assert memory.eigendecompositions_at_once(28672) == 1
    assert memory.eigendecompositions_at_once(14336) == 3
    monkeypatch.setattr(memory, "free_on_host", lambda: 1)
    assert memory.eigendecompositions_at_once(4096) == 1


def test_all_hosts_eigendecompose_as_many_side_by_side(monkeypatch):
    gather = "jax.experimental.multihost_utils.process_allgather"
    monkeypatch.setattr(memory, "usable_cores", lambda: 16)
    monkeypatch.setattr(memory, "free_on_host", lambda: 64 << 30)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(gather, lambda mine: np.stack([mine, np.float32(3)]))
    assert memory.eigendecompositions_at_once(4096) == 3
    monkeypatch.setattr(gather, lambda mine: np.stack([mine, np.float32(0)]))
    assert memory.eigendecompositions_at_once(4096) == 1


def test_where_few_matrices_fit_each_has_several_cores(monkeypatch):
    monkeypatch.setattr(eigensolver, "usable_cores", lambda: 6)

    def threads(_):
        return {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}

    for workers, each in ((6, 1), (3, 2), (4, 1), (1, 6)):
        monkeypatch.setattr(eigensolver, "eigendecompositions_at_once", lambda _, n=workers: n)
        assert list(eigensolver.side_by_side(threads, range(3), 10)) == [{each}] * 3
