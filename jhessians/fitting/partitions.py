"""Groups of linears that are fitted one after the other, where all factors don't fit at once.

Each group takes passes of its own over the data, so the fewest groups are the fastest.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from jhessians.capture.site import Site
from jhessians.capture.sites import restrict, unshared
from jhessians.devices.memory import free_memory
from jhessians.errors import ConfigError
from jhessians.fitting.memory import counted_stage_bytes, stage_bytes

SHARE = 0.6
"""Of the memory that is free once the model is loaded, what factors may take during a pass; the
rest is for activations."""

SHARE_BETWEEN = 0.9
"""The same between the passes, where there are no activations."""


class _Unit(NamedTuple):
    """Modules that read the same input, so that they must stay together.

    Attributes:
        modules: The site of each, by its full name.
        numbers: Of their eigenvectors and corrected eigenvalues, which as a rule take most.
    """

    modules: dict[str, str]
    numbers: int


def partition(sites: Mapping[str, Site], count: int) -> list[dict[str, Site]]:
    """`count` groups of about equal memory; linears that share an input stay together.

    Args:
        sites: All linears.
        count: How many groups are wanted.

    Returns:
        Sites by name, of one group after the other; a stack may be spread over several groups.

    Raises:
        ConfigError: If there are fewer linears than groups.
    """
    if count == 1:
        return [dict(sites)]
    units = _units(sites)
    if count > len(units):
        raise ConfigError(
            f"`module_partitions` {count} divides {len(units)} groups of modules that read the "
            f"same input; give at most {len(units)}"
        )
    found: list[dict[str, Site]] = []
    for group in _balanced(units, count):
        names = {name for unit in group for name in unit.modules}
        found.append(restrict(sites, names.__contains__))
    return found


def unit_count(sites: Mapping[str, Site]) -> int:
    """How many groups there can be at most."""
    return len(_units(sites))


def needed_partitions(
    sites: Mapping[str, Site],
    itemsize: int,
    devices: int,
    *,
    hosts: int = 1,
    shares_inputs: bool = True,
    warn: Callable[[str], None] = lambda line: None,
) -> int:
    """How many groups make the factors of each fit into the memory that is free.

    Args:
        sites: All linears.
        itemsize: Bytes of a number.
        devices: Over which rows are spread.
        hosts: Between which matrices move to be decomposed.
        shares_inputs: Whether linears that read the same array have one activation matrix.
        warn: Is told if a group would not fit whose linears must stay together.

    Returns:
        The fewest that fit; where single linears don't, they are groups of their own.
    """
    units, free = _units(sites), free_memory()

    def taken(group: Sequence[_Unit]) -> float:
        """What a group takes of what its factors may take, at the moment of most."""
        members = Counter(site for unit in group for site in unit.modules.values())
        counted = [
            (sites[name] if shares_inputs else replace(sites[name], input_site=name), n)
            for name, n in members.items()
        ]
        stages = counted_stage_bytes(counted, itemsize, devices=devices, hosts=hosts)
        in_passes = max(stages.covariances, stages.correction)
        return max(in_passes / SHARE, stages.between / SHARE_BETWEEN) / free

    def fit(count: int) -> bool:
        return all(len(group) == 1 or taken(group) <= 1 for group in _balanced(units, count))

    largest = max(units, key=lambda unit: taken([unit]))
    if (least := taken([largest])) > 1:
        warn(
            f"the factors of {_in_words(largest)} must be fitted together, and take {least:.3g} "
            f"times the memory that is free for them on each device: it may run out; use more "
            "devices"
        )
    # A binary search, as if more groups never made one larger.
    low, high = 1, len(units)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(middle) else (middle + 1, high)
    return low


def factor_bytes(
    sites: Mapping[str, Site], count: int, itemsize: int, *, shares_inputs: bool = True
) -> int:
    """Bytes of the factors of the largest of `count` groups, over all devices, during a pass.

    Args:
        sites: All linears.
        count: How many groups.
        itemsize: Bytes of a number.
        shares_inputs: As for `needed_partitions`.

    Returns:
        Bytes.

    Raises:
        ConfigError: If there are fewer linears than groups.
    """
    groups = partition(sites, count)
    if not shares_inputs:
        groups = [unshared(group) for group in groups]
    stages = [stage_bytes(group.values(), itemsize) for group in groups]
    return max(max(each.covariances, each.correction) for each in stages)


def _units(sites: Mapping[str, Site]) -> list[_Unit]:
    """Modules that must stay together, layer by layer."""
    modules: dict[tuple[int, str], dict[str, str]] = {}
    numbers: Counter[tuple[int, str]] = Counter()
    for site in sites.values():
        o, i = site.out_features, site.inputs
        for slot, name in zip(site.slots, site.module_names(), strict=True):
            key = (slot or 0, site.input_site)
            modules.setdefault(key, {})[name] = site.name
            numbers[key] += o * o + o * i + (i * i if site.owns_input else 0)
    return [_Unit(modules[key], numbers[key]) for key in sorted(modules, key=lambda key: key[0])]


def _balanced(units: Sequence[_Unit], count: int) -> list[list[_Unit]]:
    """Divide units among groups: the largest first, each to the group that has least.

    Args:
        units: In the order of layers.
        count: How many groups, at most as many as units.

    Returns:
        Groups, none of them empty.
    """
    groups: list[list[_Unit]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for unit in sorted(units, key=lambda unit: -unit.numbers):
        load, number = heapq.heappop(loads)
        groups[number].append(unit)
        heapq.heappush(loads, (load + unit.numbers, number))
    return groups


def _in_words(unit: _Unit) -> str:
    first, *others = unit.modules
    return first if not others else f"{first} and {len(others)} more that read the same input"
