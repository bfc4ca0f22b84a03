"""Groups of linears that are fitted one after the other, where all factors don't fit at once.

Each group takes passes of its own over the data, so the fewest groups are the fastest.
"""

import math
from collections.abc import Mapping

from jhessians.capture.site import Site
from jhessians.capture.sites import restrict
from jhessians.devices.memory import free_memory
from jhessians.errors import ConfigError
from jhessians.fitting.memory import factor_numbers

SHARE = 0.6
"""Of the memory that is free once the model is loaded, what factors may take; the rest is for
activations and for what is on its way to a solver or a file."""


def partition(sites: Mapping[str, Site], count: int) -> list[dict[str, Site]]:
    """At most `count` groups of about equal memory; linears that share an input stay together.

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
    total, before = sum(size for _, size in units), 0
    groups: dict[int, set[str]] = {}
    for names, size in units:
        group = int((before + size / 2) / total * count)
        groups.setdefault(min(group, count - 1), set()).update(names)
        before += size
    return [restrict(sites, group.__contains__) for group in groups.values()]


def needed_partitions(sites: Mapping[str, Site], itemsize: int, devices: int) -> int:
    """How many groups make the factors of each fit into the memory that is free.

    Args:
        sites: All linears.
        itemsize: Bytes of a number.
        devices: Over which rows are spread.

    Returns:
        At least 1, and at most one for each group of linears that must stay together; even so many
        may be too few.
    """
    units = _units(sites)
    needed = sum(size for _, size in units) * itemsize / devices
    return min(len(units), max(1, math.ceil(needed / (SHARE * free_memory()))))


def factor_bytes(sites: Mapping[str, Site], count: int, itemsize: int) -> int:
    """Bytes of the factors of the largest of `count` groups, over all devices.

    Args:
        sites: All linears.
        count: How many groups.
        itemsize: Bytes of a number.

    Returns:
        Bytes.

    Raises:
        ConfigError: If there are fewer linears than groups.
    """
    groups = partition(sites, count)
    return max(sum(size for _, size in _units(group)) for group in groups) * itemsize


def _units(sites: Mapping[str, Site]) -> list[tuple[list[str], int]]:
    """Names of modules that must stay together, and numbers in their factors; layer by layer."""
    names: dict[tuple[int, str], list[str]] = {}
    sizes: dict[tuple[int, str], int] = {}
    for site in sites.values():
        for slot, name in zip(site.slots, site.module_names(), strict=True):
            key = (0 if slot is None else slot, site.input_site)
            names.setdefault(key, []).append(name)
            sizes[key] = sizes.get(key, 0) + factor_numbers(site)
    return [(names[key], sizes[key]) for key in sorted(names, key=lambda key: key[0])]
