"""A fit in several groups of modules: the same numbers, in less memory."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jhessians.capture.site import Site
from jhessians.capture.sites import find_sites
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.errors import ConfigError
from jhessians.fitting import partitions
from jhessians.fitting.memory import stage_bytes
from jhessians.fitting.partitions import factor_bytes, needed_partitions, partition
from tests.oracles import checkpoints
from tests.small import LLAMA, batches, decoder, documents, relative_error
from tests.tolerances import INVARIANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return checkpoints.build("llama", tmp_path_factory.mktemp("llama"), seed=3)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """`run(partitions, ...)`: a run directory, computed once, and what the run said."""
    data = checkpoints.corpus(folder, 8)
    done = {}

    def get(count, **options):
        key = f"{count} {sorted(options.items())}"
        if key not in done:
            path = tmp_path_factory.mktemp("runs") / "run"
            config = ComputeConfig(
                str(path), model=str(folder), dataset=str(data), module_partitions=count,
                world_size=1, num_shards=2, truncation=True, **options,
            )  # fmt: skip
            done[key] = path, list(compute(config).notes)
        return done[key]

    return get


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of every shard, by file and module."""
    return {
        f"{file.relative_to(path)} {name}": array
        for file in sorted(path.rglob("*.safetensors"))
        for name, array in load_file(file).items()
    }


@pytest.mark.parametrize("method, layout", [("ekfac", "both"), ("shampoo", "influence_results")])
def test_the_files_are_the_same(run, method, layout):
    whole, nothing = run(1, method=method, layout=layout)
    parts, said = run(3, method=method, layout=layout)
    assert not nothing and [line[:16] for line in said] == [f"Partition {k} of 3" for k in "123"]
    expected, found = tensors(whole), tensors(parts)
    assert list(found) == list(expected) and len(expected) > 100
    for name, array in expected.items():
        assert found[name].shape == array.shape and found[name].any(), name
        # Rounding turns eigenvectors, and what is computed in them, by more than sums differ.
        if "eigen" not in name or "eigenvalue_sharded" in name:
            assert relative_error(found[name], array) < INVARIANCE, name


def sites():
    model = decoder(layers=4, **LLAMA)
    loss = lambda model, batch: model(batch.tokens).sum()  # noqa: E731
    return find_sites(loss, model, batches(documents([9, 5]))[0])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
def test_groups_are_whole_and_of_about_equal_size(count):
    everything = sites()
    groups = partition(everything, count)
    names = [n for group in groups for site in group.values() for n in site.module_names()]
    assert sorted(names) == sorted(n for s in everything.values() for n in s.module_names())
    assert 1 < len(groups) <= count or count == 1
    for group in groups:
        for site in group.values():  # query, key and value share an input, and stay together
            assert site.input_site in group and group[site.input_site].members == site.members
    if count == 4:
        assert [{m for s in g.values() for m in s.members} for g in groups] == [{0}, {1}, {2}, {3}]


def bytes_by_stage(everything, itemsize=4, devices=1) -> tuple[int, int, int]:
    """Of A and S, whole below 512 features; eigenvectors; and corrected eigenvalues."""
    a_and_s = vectors = squares = 0
    for site in everything.values():
        i, o = site.inputs, site.out_features
        for d in (o, *[i] * site.owns_input):
            edges = [0, d // 3, 2 * d // 3, d] if d >= 512 else [0, d]
            for start, stop in itertools.pairwise(edges):
                a_and_s += len(site.slots) * math.ceil((stop - start) / devices) * (d - start)
            vectors += len(site.slots) * math.ceil(d / devices) * d
        squares += len(site.slots) * math.ceil(o / devices) * i
    return itemsize * a_and_s, itemsize * vectors, itemsize * squares


@pytest.mark.parametrize("devices, itemsize", [(1, 4), (3, 8)])
def test_bytes_of_each_stage(devices, itemsize):
    for everything in (sites(), llama_8b()):
        a_and_s, vectors, squares = bytes_by_stage(everything, itemsize, devices)
        found = stage_bytes(everything.values(), itemsize, devices=devices)
        assert found.covariances == a_and_s and found.correction == vectors + squares
        # Never all of both; but all of the larger kind, and at least a stack of the other.
        assert max(a_and_s, vectors) < found.between < a_and_s + vectors


def test_as_many_as_memory_needs(monkeypatch):
    everything = sites()
    monkeypatch.setattr(partitions, "free_memory", lambda: 1 << 40)
    assert needed_partitions(everything, 4, 1) == 1
    _, vectors, squares = bytes_by_stage(everything)
    one = vectors + squares
    assert factor_bytes(everything, 1, 4) == one and factor_bytes(everything, 4, 4) == one / 4
    monkeypatch.setattr(partitions, "SHARE_BETWEEN", 9.0)
    monkeypatch.setattr(partitions, "free_memory", lambda: one / partitions.SHARE / 1.9)
    assert needed_partitions(everything, 4, 1) == 2
    assert needed_partitions(everything, 4, 2) == 1  # rows are spread over devices
    said = []
    monkeypatch.setattr(partitions, "free_memory", lambda: 1)
    count = needed_partitions(everything, 4, 1, warn=said.append)
    (line,) = said
    assert "and 1 more that read the same input must be fitted together" in line
    assert count == 16  # no group can be smaller


def llama_8b(layers: int = 32) -> dict[str, Site]:
    """The linears of Llama-3-8B."""
    h, kv, m = 4096, 1024, 14336
    shapes = {"q": (h, h, "q"), "k": (h, kv, "q"), "v": (h, kv, "q"), "o": (h, h, "o"),
              "gate": (h, m, "gate"), "up": (h, m, "gate"), "down": (m, h, "down")}  # fmt: skip
    members = tuple(range(layers))
    return {
        f"h.{{layer}}.{name}": Site(
            f"h.{{layer}}.{name}", i, o, False, stack=(("layer", layers),), members=members,
            input_site=f"h.{{layer}}.{owner}",
        )
        for name, (i, o, owner) in shapes.items()
    }  # fmt: skip


WEIGHTS = 16.06e9  # bf16
MACHINES = {"24 GB": (1, 1, 24e9), "80 GB": (1, 1, 80e9), "16 x 16 GB": (16, 4, 16e9)}


@pytest.mark.parametrize("name, expected", [("24 GB", 26), ("80 GB", 4), ("16 x 16 GB", 1)])
def test_llama_8b_fits_everywhere(monkeypatch, name, expected):
    """Every group fits, the largest is hardly larger than the mean, and fewer would not do."""
    devices, hosts, memory = MACHINES[name]
    free, everything = memory - WEIGHTS / devices, llama_8b()
    monkeypatch.setattr(partitions, "free_memory", lambda: free)
    said = []
    count = needed_partitions(everything, 4, devices, hosts=hosts, warn=said.append)
    assert count <= expected and not said
    groups = partition(everything, count)
    sizes = []
    for group in groups:
        a_and_s, vectors, squares = bytes_by_stage(group, devices=devices)
        assert max(a_and_s, vectors + squares) <= partitions.SHARE * free
        stages = stage_bytes(group.values(), 4, devices=devices, hosts=hosts)
        assert stages.between <= partitions.SHARE_BETWEEN * free
        sizes.append(vectors + squares)
    assert len(groups) == count and max(sizes) < 1.1 * np.mean(sizes)
    assert sum(sizes) / (partitions.SHARE * free) > count - 2


def test_what_cannot_fit_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr(partitions, "free_memory", lambda: 2e9)
    said = []
    count = needed_partitions(llama_8b(), 4, 1, warn=said.append)
    (line,) = said
    assert "the factors of h.0.gate and 1 more that read the same input must be" in line
    # What can fit does: only those are in groups that are larger.
    for group in partition(llama_8b(), count):
        if "h.{layer}.gate" not in group:
            assert stage_bytes(group.values(), 4).correction <= partitions.SHARE * 2e9
        else:
            assert set(group) == {"h.{layer}.gate", "h.{layer}.up"}
            assert len(group["h.{layer}.up"].members) == 1


def test_automatic_writes_the_number(run, monkeypatch):
    monkeypatch.setattr(partitions, "free_memory", lambda: 500_000)
    path, said = run("auto")
    count = int(said[0].split()[3].rstrip(":"))
    assert count > 1 and f"module_partitions: {count}" in (path / "config.yaml").read_text()


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`module_partitions` 99 .* give at most 16"):
        partition(sites(), 99)
    config = ComputeConfig(str(tmp_path / "run"), module_partitions=2)
    with pytest.raises(ConfigError, match="--module_partitions divides the fit of Kronecker"):
        replace(config, method="autocorrelation").validate()
    with pytest.raises(ConfigError, match="at least 1"):
        ComputeConfig(str(tmp_path / "run"), module_partitions=0)


def test_groups_are_divided_evenly():
    """What a group's factors take is about its share of everything."""
    everything = llama_8b()
    whole = factor_bytes(everything, 1, 4)
    for count in (2, 3, 5, 9, 17, 26):
        assert whole / count <= factor_bytes(everything, count, 4) < 1.1 * whole / count, count
