"""Which linears a loss calls: one trace of it, in which nothing is computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax import nnx
from flax.nnx.tracers import TraceState

from jhessians.capture.coverage import Sites, held_parameters, parameters_of
from jhessians.capture.linears import Tapped, Weight, attach, modules, weights
from jhessians.capture.problem import Loss
from jhessians.capture.products import Product
from jhessians.capture.routing import Routing
from jhessians.capture.shards import Shards
from jhessians.capture.site import Site, Statistics
from jhessians.capture.tape import TRANSFORMED, Tape
from jhessians.capture.taps import product
from jhessians.typing import Array, PyTree


def find_sites(
    loss: Loss,
    model: nnx.Module,
    batch: PyTree,
    *,
    include_bias: bool = False,
    select: Callable[[str], bool] = lambda name: True,
) -> Sites:
    """The linears that `loss` calls, found by tracing it once without computing anything.

    Recorded are `jhessians.Linear`, and of Flax `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`
    and `nnx.LoRA`, alone or inside other modules such as `nnx.MultiHeadAttention`, where their
    input has documents as its first axis and their product is a matrix product. A linear with
    several input or output axes counts as one with all of them flattened, in the kernel's order.

    Args:
        loss: The loss whose curvature is wanted.
        model: Arrays or shapes.
        batch: Arrays or shapes, documents first; other sizes don't matter.
        include_bias: Whether biases count as weights, for the linears that have one.
        select: Tells from a module's full name whether to record it.

    Returns:
        Sites by name, in the order in which the model calls them; a linear of Flax is named by its
        path. Linears that are called on the very same array share its input statistics. The
        attribute `coverage` says which share of the parameters they hold, and lists every
        parameter that is passed over with the reason.

    Raises:
        ValueError: If the loss calls no linear that can be recorded, or if linears share their
            weight but not their bias, and biases count.
    """
    documents = {x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "ndim", 0)}
    graph, state = nnx.split(model)
    notes = _Notes(documents)

    def trace(state: nnx.State[Any, Any], batch: PyTree) -> Array:
        copy = nnx.merge(graph, state, copy=True)
        attach(copy, _Listener(notes))
        return loss(copy, batch)

    jax.eval_shape(trace, state, batch)
    notes.passed_over |= _used_elsewhere(model)
    first: dict[int, str] = {}
    sites = {}
    for name, (site, read) in notes.calls.items():
        if name in notes.passed_over:
            continue
        if include_bias and len(notes.biases[name]) > 1:
            raise ValueError(
                f"the linears that share the weight {name} have biases of their own; leave biases "
                "out, or let them share the bias too"
            )
        input_site = name if read is None else first.setdefault(id(read), name)
        sites[name] = replace(site, ones=include_bias and site.use_bias, input_site=input_site)
    everything = Sites(sites, parameters_of(model, sites, notes.passed_over))
    if not sites:
        reasons = dict.fromkeys(each.reason for each in everything.passed_over)
        raise ValueError(
            f"the loss calls no linear of {type(model).__name__} that can be recorded; its "
            f"parameters are {'; '.join(reasons) or 'none'}; expected jhessians.Linear, "
            "nnx.Linear, nnx.LinearGeneral, nnx.Einsum or nnx.LoRA"
        )
    return restrict(everything, select)


def restrict(sites: Mapping[str, Site], select: Callable[[str], bool]) -> Sites:
    """Some of the sites, and of stacks some of the members.

    Args:
        sites: By name.
        select: Tells from a module's full name whether to keep it.

    Returns:
        The sites of which a module is kept, in the same order. If the linear that kept an input's
        statistics is left out, the next one that reads the same input keeps them.
    """
    kept: dict[str, Site] = {}
    owners: dict[tuple[Any, ...], str] = {}
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
    return Sites(kept, getattr(sites, "parameters", ()))


def unshared(sites: Mapping[str, Site]) -> Sites:
    """The same sites, each keeping its own input's statistics."""
    own = {name: replace(site, input_site=name) for name, site in sites.items()}
    return Sites(own, getattr(sites, "parameters", ()))


def _used_elsewhere(model: nnx.Module) -> dict[str, str]:
    """Linears of which a weight is also held by a module that isn't a linear, with the reason."""
    names, holders = dict[int, str](), dict[int, str]()
    for path, module in modules(model, inside_stacks=True):
        kernels = {id(weight.kernel): weight.name for weight in weights(module, path)}
        names = kernels | names  # the first name counts
        for where, variable in held_parameters(module, path):
            if id(variable) not in kernels:
                holders[id(variable)] = where
    return {
        name: f"of linears whose weight serves elsewhere too, as {holders[kernel]}"
        for kernel, name in names.items()
        if kernel in holders
    }


@dataclass
class _Notes:
    """What the trace of `find_sites` sees.

    Attributes:
        documents: The sizes that the batch's arrays have along their first axis.
        calls: Of each linear its site and the array that it reads, None if it reads several.
        biases: The identities of the biases of the linears that share a weight.
        passed_over: Linears that can't be recorded, with the reason.
    """

    documents: set[int]
    calls: dict[str, tuple[Site, Any]] = field(default_factory=dict)
    biases: dict[str, set[int]] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)


class _Listener(Tape):
    """The tape while `find_sites` traces: notes which linear is called on what."""

    def __init__(self, notes: _Notes, stack: tuple[tuple[str, int], ...] = ()):
        self.notes = notes
        self.stack = stack
        self.statistics: Statistics = {}
        self.trace = TraceState()

    def inside(self, statistics: Statistics, layer: Array, count: int) -> "_Listener":
        return _Listener(self.notes, (("layer", count),))

    def gather_weights(self, module: nnx.Module) -> None:
        pass

    def close(self) -> Statistics:
        return self.statistics

    def record(
        self, linear: Tapped, x: Array, kernel: Array | Shards, routing: Routing | None = None
    ) -> Array:
        bias = getattr(linear, "bias", None)
        stack = self.stack
        if routing is not None:
            stack = (*stack, ("expert", kernel.shape[0]))
        site = Site(
            str(linear.name),
            in_features=kernel.shape[-2],
            out_features=kernel.shape[-1],
            use_bias=bias is not None,
            stack=stack,
        )
        self._note(site, x, bias, members=linear.members, routed=routing is not None)
        return product(x, kernel, routing)

    def observe(self, weight: Weight, how: Product, x: Array, kernel: Array, y: Array) -> Array:
        if obstacle := how.obstacle(x.shape, kernel.shape):
            self.notes.passed_over[weight.name] = f"of linears that can't be recorded: {obstacle}"
            return y
        a, g = how.flat_input(x), how.flat_output(y)
        site = Site(
            weight.name,
            in_features=a.shape[-1],
            out_features=g.shape[-1],
            use_bias=weight.bias is not None,
            stack=self.stack,
        )
        self._note(site, a, weight.bias)
        return y

    def _note(
        self, site: Site, x: Array, bias: Any, *, members: Any = None, routed: bool = False
    ) -> None:
        """Note a call, or why it can't be recorded."""
        notes, name = self.notes, site.name
        if site.stack:
            site = replace(site, members=members or tuple(range(site.stack_size)))
        notes.biases.setdefault(name, set()).add(id(bias))
        before, _ = notes.calls.get(name, (None, None))
        if before is not None and replace(before, calls=1) != site:
            notes.passed_over[name] = "of linears that share a weight in different forms"
        if not self.trace.is_valid():
            notes.passed_over[name] = f"of linears that can't be recorded: {TRANSFORMED}"
        elif not routed and (x.ndim < 2 or x.shape[0] not in notes.documents):
            notes.passed_over[name] = (
                "of linears whose input doesn't have the batch's documents as its first axis"
            )
        if before is None:
            notes.calls[name] = (site, x)
        else:  # a second call reads another array
            notes.calls[name] = (replace(before, calls=before.calls + 1), None)
