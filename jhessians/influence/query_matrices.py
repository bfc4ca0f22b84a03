"""A group of queries as matrices by module, and back to operands, which are stacked by site."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.capture.fold import Matrices
from jhessians.capture.site import Operands
from jhessians.capture.traversal import row_shardings
from jhessians.influence.metric import WholeGradients
from jhessians.typing import Array, Float


def matrices_of(metric: WholeGradients, operands: Operands) -> dict[str, Float[Array, "query _ _"]]:
    """The matrices of a group of whole queries.

    Args:
        metric: That the group was made for.
        operands: The group's.

    Returns:
        Module → matrices, on every device.
    """
    sites, mesh = metric.problem.sites, metric.problem.mesh

    def split(operands: Operands) -> dict[str, Array]:
        return {
            module: (values if slot is None else values[slot])[:, : site.out_features]
            for name, site in sites.items()
            for values in (operands[name]["queries"].values,)
            for slot, module in zip(site.slots, site.module_names(), strict=True)
        }

    everywhere = None if mesh is None else NamedSharding(mesh, P())
    found: dict[str, Array] = jax.jit(split, out_shardings=everywhere)(operands)
    return found


def operands_of(metric: WholeGradients, matrices: Mapping[str, Array]) -> Operands:
    """The operands of a group whose queries have these matrices; the opposite of `matrices_of`.

    Args:
        metric: That the group is for.
        matrices: Module → [query, out, in].

    Returns:
        Operands, their rows spread over the devices.
    """
    sites, mesh = metric.problem.sites, metric.problem.mesh
    devices = 1 if mesh is None else mesh.size

    def stacked(matrices: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
        operands = {}
        for name, site in sites.items():
            members = [matrices[module] for module in site.module_names()]
            values = members[0] if site.members is None else jnp.stack(members)
            missing = [(0, 0)] * (values.ndim - 2) + [(0, -site.out_features % devices), (0, 0)]
            operands[name] = {"queries": Matrices(jnp.pad(values, missing))}
        return operands

    shardings = None
    if mesh is not None:
        shardings = row_shardings(sites, jax.eval_shape(stacked, dict(matrices)), mesh)
    found: Operands = jax.jit(stacked, out_shardings=shardings)(dict(matrices))
    return found
