"""One of several processes that decompose covariances together, and say what that took.

Takes the coordinator's port, the number of processes, this one's, the folder of its results, and
how many layers there are.
"""

import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jhessians.capture.problem import Problem
from jhessians.capture.site import Site
from jhessians.devices.exchange import Exchange
from jhessians.devices.mesh import make_mesh
from jhessians.fitting.eigenbases import TermCounts, place_rows
from jhessians.fitting.eigendecomposition import eigendecompose_covariances
from jhessians.fitting.factors import covariance_tensors, eigen_tensors
from jhessians.interop.shards import write_sharded
from jhessians.linalg.symmetric import block_bounds

WIDE, NARROW = 768, 520
HEAD = 40


def sites(layers: int) -> dict[str, Site]:
    """A stack of linears, and a small one outside of it."""
    stack, members = (("layer", layers),), tuple(range(layers))
    name = "h.{layer}.up"
    return {
        name: Site(name, NARROW, WIDE, False, stack=stack, members=members, input_site=name),
        "head": Site("head", HEAD, HEAD, False, input_site="head"),
    }


def covariance(d: int, number: int) -> np.ndarray:
    """A symmetric matrix, well conditioned, with eigenvalues that differ."""
    values = np.random.default_rng(number).standard_normal((d, d), dtype=np.float32)
    return values + values.T + np.diag(np.arange(d, dtype=np.float32))


def statistics(layers: int, mesh):
    """What a pass leaves: packed, the rows of each block padded and spread over the devices."""

    def blocks(site: Site, d: int):
        for start, stop in block_bounds(d):
            rows = [covariance(d, slot or 0)[start:stop, start:] for slot in site.slots]
            block = rows[0] if site.members is None else np.stack(rows)
            yield place_rows(block, mesh, axis=block.ndim - 2)

    return {
        name: {
            "activation": tuple(blocks(site, site.inputs)),
            "gradient": tuple(blocks(site, site.out_features)),
        }
        for name, site in sites(layers).items()
    }


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Looks again and again how much memory the process has."""

    def __enter__(self):
        self.start = self.most = resident()
        self._going = True
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self):
        while self._going:
            self.most = max(self.most, resident())
            time.sleep(0.001)

    def __exit__(self, *error):
        self._going = False
        self._thread.join()


def main(port: str, count: str, process: str, folder: str, layers: str) -> None:
    """Decompose, write, and print a line of JSON."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(process))
    mesh, dtype = make_mesh(), np.dtype(np.float32)
    terms, run = TermCounts(3), Path(folder)
    brought, gathered = [], []
    bring, gather = Exchange.bring, multihost_utils.process_allgather
    broadcast = multihost_utils.broadcast_one_to_all

    def counted_bring(self, arrays):
        found = bring(self, arrays)
        brought.append(0 if found is None else found.nbytes)
        return found

    def counted_gather(x, **options):
        gathered.extend(each.nbytes for each in jax.tree.leaves(x))
        return gather(x, **options)

    def counted_broadcast(x, **options):
        gathered.extend(each.nbytes for each in jax.tree.leaves(x))
        return broadcast(x, **options)

    def fitted(layers: int) -> tuple[Problem, dict, Watch, object]:
        problem = Problem(lambda model, batch: 0, None, sites(layers), mesh=mesh)
        sums = statistics(layers, mesh)
        jax.block_until_ready(sums)
        with Watch() as watch:
            bases = eigendecompose_covariances(problem, sums, terms=terms, dtype=dtype)
            jax.block_until_ready(bases.vectors)
        return problem, sums, watch, bases

    fitted(1)  # what is compiled and loaded once
    Exchange.bring = counted_bring
    multihost_utils.process_allgather = counted_gather
    multihost_utils.broadcast_one_to_all = counted_broadcast
    problem, _, watch, bases = fitted(int(layers))
    received = {"brought": sum(brought), "gathered": max(gathered, default=0)}
    for kinds in (
        covariance_tensors(problem.sites, statistics(int(layers), mesh)),
        eigen_tensors(problem.sites, bases, terms, documents=2),
    ):
        for kind, tensors in kinds.items():
            write_sharded(run / kind, tensors, shards=2, dtype="fp32")
    values = hashlib.sha256()
    for own in bases.values.values():
        for side in sorted(own):
            values.update(own[side].tobytes())
    print(json.dumps({
        **received, "grew": watch.most - watch.start, "values": values.hexdigest(),
        "gathered_in_all": max(gathered, default=0),
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
