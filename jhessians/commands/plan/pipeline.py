"""What `plan` does: find out what the fit takes of the machines, and say it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from jhessians.commands.output import write_json
from jhessians.commands.plan.advice import advise
from jhessians.commands.plan.config import PlanConfig
from jhessians.commands.plan.fit import read_fit
from jhessians.commands.plan.planner import Planner
from jhessians.commands.plan.words import document, render
from jhessians.devices.axes import parse_axes, short_factors, size_of
from jhessians.devices.memory import free_memory, free_on_host
from jhessians.devices.mesh import LONGEST_OF_OTHERS
from jhessians.errors import ConfigError
from jhessians.linalg.eigen import usable_cores
from jhessians.planning.hardware import (
    Device,
    Machines,
    parse_devices,
    parse_memory,
    parse_topology,
)


def plan(config: PlanConfig) -> str:
    """Plan a fit.

    Args:
        config: Validated.

    Returns:
        What the terminal shows.

    Raises:
        UserError: If the model or the data can't be read, or there are no such machines.
        OutputError: If the file of `json` can't be written.
    """
    machines, notes = machines_of(config), list[str]()
    planner = Planner(read_fit(config, notes.append), machines)
    found = planner.plan()
    compiled = {}
    if config.compile:
        from jhessians.commands.plan.compiled import compiled_steps

        compiled = compiled_steps(planner, found)
    advice = [*notes, *advise(planner, found)]
    if config.json is not None:
        write_json(document(config.model, found, compiled, advice), Path(config.json))
    return render(config.model, found, compiled, advice)


def machines_of(config: PlanConfig) -> Machines:
    """The machines that the options name; by default this one.

    Args:
        config: The options.

    Returns:
        Devices, as they lie along the axes of the mesh.

    Raises:
        ConfigError: If there are no such machines.
    """
    if config.topology is not None:
        device, sides = parse_topology(config.topology)
        factors = [size for side in sides for size in short_factors(side)]
        return Machines(device, _axes(config, factors), config.topology)
    memory = None if config.memory is None else parse_memory(config.memory)
    if config.devices is not None:
        device, count = parse_devices(config.devices, memory)
        return Machines(device, _axes(config, short_factors(count, LONGEST_OF_OTHERS)))
    if memory is not None:
        return Machines(Device("device", memory))
    count = jax.device_count()
    here = Device(
        jax.devices()[0].device_kind, free_memory(), per_host=count, host_memory=free_on_host(),
        cores=usable_cores(), platform=jax.default_backend(),
    )  # fmt: skip
    return Machines(here, _axes(config, short_factors(count, LONGEST_OF_OTHERS)))


def _axes(config: PlanConfig, factors: Sequence[int]) -> dict[str, int]:
    """The axes of the mesh: those of `--mesh`, or short ones.

    Returns:
        Name of each axis → how many devices lie along it.

    Raises:
        ConfigError: If those of `--mesh` don't multiply out.
    """
    found = {f"devices{number}": size for number, size in enumerate(factors or (1,))}
    if config.mesh is None:
        return found
    asked, count = parse_axes(config.mesh), size_of(found)
    if size_of(asked) != count:
        raise ConfigError(
            f"--mesh {config.mesh} is of {size_of(asked)} devices, but {count} are planned with; "
            f"give sizes that multiply to {count}"
        )
    return asked
