"""A fit in several groups of modules: the same numbers, in less memory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jhessians.capture.sites import find_sites
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.errors import ConfigError
from jhessians.fitting import partitions
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


def test_as_many_as_memory_needs(monkeypatch):
    everything = sites()
    monkeypatch.setattr(partitions, "free_memory", lambda: 1 << 40)
    assert needed_partitions(everything, 4, 1) == 1
    one = needed_bytes(everything)
    assert factor_bytes(everything, 1, 4) == one and factor_bytes(everything, 4, 4) == one / 4
    monkeypatch.setattr(partitions, "free_memory", lambda: one / partitions.SHARE / 2.5)
    assert needed_partitions(everything, 4, 1) == 3
    assert needed_partitions(everything, 4, 3) == 1  # rows are spread over devices
    monkeypatch.setattr(partitions, "free_memory", lambda: 1)
    assert needed_partitions(everything, 4, 1) == 16  # no group can be smaller


def needed_bytes(everything) -> int:
    """A and S, whole below 512 features, their eigenvectors, and the corrected eigenvalues."""
    total = 0
    for site in everything.values():
        i, o = site.inputs, site.out_features
        a = 2 * i * i if site.owns_input else 0
        total += len(site.slots) * 4 * (a + 2 * o * o + o * i)
    return total


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


def test_kept_in_memory_is_less():
    """What a group's factors take is about its share of everything."""
    everything = sites()
    whole = partitions._units(everything)
    for group in partition(everything, 4):
        size = sum(size for _, size in partitions._units(group))
        assert np.isclose(size, sum(size for _, size in whole) / 4)
