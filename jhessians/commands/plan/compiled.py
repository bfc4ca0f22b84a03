"""The real steps of a plan, compiled for TPUs that need not be there."""

from __future__ import annotations

from typing import Any

from jhessians.commands.plan.planner import Planner
from jhessians.devices.mesh import make_mesh
from jhessians.devices.topology import topology_devices
from jhessians.fitting.passes import Pass
from jhessians.planning.plan import Plan


def compiled_steps(planner: Planner, plan: Plan) -> dict[str, int]:
    """What XLA's compiler for TPUs says of each pass.

    Args:
        planner: Of the plan, for a topology.
        plan: The fit.

    Returns:
        Stage → bytes of each device, at the fullest moment of a step.

    Raises:
        MeshError: If there is no such topology, or no compiler for TPUs.
    """
    assert plan.machines.topology is not None
    devices = topology_devices(plan.machines.topology)
    mesh = make_mesh(axes=planner.fit.config.mesh, devices=devices)
    group, batch = planner.largest_group(plan.partitions), planner.batch(plan.token_batch_size)
    found = {}
    for name, each in planner.passes(group, plan.activations, mesh).items():
        work = Pass(each.fold, each.problem, dtype=planner.dtype)
        step = work.lower(batch, operands=each.operands).compile()
        analysis: Any = step.memory_analysis()
        found[name] = int(analysis.peak_memory_in_bytes)
    return found
