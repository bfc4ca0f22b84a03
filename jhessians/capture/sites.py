"""Which linears a loss calls: one trace of it, in which nothing is computed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from jhessians.capture.problem import Loss
from jhessians.capture.routing import Routing
from jhessians.capture.site import Site, Statistics
from jhessians.capture.tape import Tape, Tapped, attach, product
from jhessians.typing import Array, PyTree


def find_sites(
    loss: Loss,
    model: nnx.Module,
    batch: PyTree,
    *,
    include_bias: bool = False,
    select: Callable[[str], bool] = lambda name: True,
) -> dict[str, Site]:
    """The linears that `loss` calls, found by tracing it once without computing anything.

    Args:
        loss: The loss whose curvature is wanted.
        model: Arrays or shapes.
        batch: Arrays or shapes; only their ranks matter.
        include_bias: Whether biases count as weights, for the linears that have one.
        select: Tells from a module's full name whether to record it.

    Returns:
        Sites by name, in the order in which the model calls them. Linears that are called on the
        very same array share its input statistics.
    """
    listener = _Listener()
    graph, state = nnx.split(model)

    def trace(state, batch):
        copy = nnx.merge(graph, state)
        attach(copy, listener)
        return loss(copy, batch)

    jax.eval_shape(trace, state, batch)
    first: dict[int, str] = {}
    sites = {}
    for name, (site, read) in listener.calls.items():
        input_site = name if read is None else first.setdefault(id(read), name)
        sites[name] = replace(site, ones=include_bias and site.use_bias, input_site=input_site)
    return restrict(sites, select)


def restrict(sites: Mapping[str, Site], select: Callable[[str], bool]) -> dict[str, Site]:
    """The sites, and of stacks the members, whose full module names `select` accepts."""
    kept: dict[str, Site] = {}
    owners: dict[tuple, str] = {}
    for site in sites.values():
        chosen = [slot for slot, module in zip(site.slots, site.module_names(), strict=True)
                  if select(module)]  # fmt: skip
        if not chosen:
            continue
        members = site.members
        if members is not None:
            members = tuple(members[slot] for slot in chosen if slot is not None)
        # Input statistics are shared only where they are the same in every layer.
        owner = owners.setdefault((site.input_site, members, site.ones), site.name)
        kept[site.name] = replace(site, members=members, input_site=owner)
    return kept


def unshared(sites: Mapping[str, Site]) -> dict[str, Site]:
    """The same sites, each keeping its own input's statistics."""
    return {name: replace(site, input_site=name) for name, site in sites.items()}


class _Listener(Tape):
    """The tape while `find_sites` traces: notes who is called on what."""

    def __init__(self, calls=None, stack: tuple[tuple[str, int], ...] = ()):
        self.calls: dict[str, tuple[Site, Any]] = {} if calls is None else calls
        self.stack = stack
        self.statistics: Statistics = {}

    def inside(self, statistics: Statistics, layer: Array, count: int) -> "_Listener":
        return _Listener(self.calls, (("layer", count),))

    def gather_weights(self, module: nnx.Module) -> None:
        pass

    def record(
        self, linear: Tapped, x: Array, kernel: Array, routing: Routing | None = None
    ) -> Array:
        name = str(linear.name)
        if name in self.calls:  # a second call reads another input
            self.calls[name] = (self.calls[name][0], None)
        else:
            stack = self.stack
            if routing is not None:
                stack = (*stack, ("expert", kernel.shape[0]))
            site = Site(
                name,
                in_features=kernel.shape[-2],
                out_features=kernel.shape[-1],
                use_bias=getattr(linear, "bias", None) is not None,
                stack=stack,
            )
            every = tuple(range(site.stack_size)) if stack else None
            site = replace(site, members=every if linear.members is None else linear.members)
            self.calls[name] = (site, x)
        return product(x, kernel, routing)
