"""The mechanism that shows every linear's input and output gradient to a fold.

A `Tape` travels with one forward pass and threads the running statistics through it. Each tapped
linear is a `jax.custom_vjp` that hands the statistics on unchanged; in the backward pass their
*cotangent* is the running sum, to which the linear adds its fold's term. So `jax.vjp`, started
from the sums accumulated so far, returns the new sums in place: no weight gradient exists, no
second copy of a factor exists, and no backward pass is written by hand.

a: [document, position, in], a linear's input. g: [document, position, out], the loss gradient at
its output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jhessians.capture.fold import Context, Fold, JointFold
from jhessians.capture.routing import Routing, grouped_product, over_grid
from jhessians.capture.site import Site, Statistics
from jhessians.typing import Array, PyTree


class Tape:
    """One forward pass's running statistics; lives only while the pass is traced."""

    def __init__(
        self,
        fold: Fold | JointFold,
        sites: Mapping[str, Site],
        statistics: Statistics,
        operands: Mapping[str, Mapping[str, Any]],
        context: Context,
        layer: Array | None = None,
    ):
        self.fold = fold
        self.sites = sites
        self.statistics = dict(statistics)
        self.operands = operands
        self.context = context
        self.layer = layer

    def inside(self, statistics: Statistics, layer: Array, count: int) -> "Tape":
        """The tape of one of a stack's `count` layers, whose statistics the scan carries."""
        return Tape(self.fold, self.sites, statistics, self.operands, self.context, layer)

    def record(
        self, linear: "Tapped", x: Array, kernel: Array, routing: Routing | None = None
    ) -> Array:
        """x @ kernel, adding the linear's term to the statistics in the backward pass.

        With a routing, x is [row, in] and the kernel [expert, in, out].
        """
        site = self.sites.get(linear.name or "")
        if site is None:
            return product(x, kernel, routing)
        operands = {**self.operands.get(site.input_site, {}), **self.operands.get(site.name, {})}
        key = self.fold.joint if isinstance(self.fold, JointFold) else site.name
        y, self.statistics[key] = _tap(
            self.fold,
            site,
            x,
            kernel,
            self.statistics[key],
            operands,
            self.context,
            self.layer,
            routing,
        )
        return y

    def gather_weights(self, module: nnx.Module) -> None:
        """Make whole, in place, the parameters of `module` that are sharded over the mesh."""
        gather_weights(module, self.context.axes)


class Tapped(nnx.Module):
    """A module that a tape is attached to as a whole: a linear, or a stack of blocks."""

    tape: Tape | None = None
    name: str | None = None
    frozen: bool = False  # is not recorded itself; what is inside it may be
    members: tuple[int, ...] | None = None  # which of a stack's to record; default all
    scans = False  # whether it runs blocks of its own, and attaches the tape to each
    suffix = ""  # of its name, where that is its path


def tapped_modules(model: nnx.Module, prefix: str = "") -> Iterator[tuple[str, Tapped]]:
    """Path and module of every tapped module that is not inside another one."""
    if isinstance(model, Tapped) and not model.frozen:
        yield prefix, model
        return
    for key, child in nnx.iter_module_children(model):
        yield from tapped_modules(child, f"{prefix}.{key}" if prefix else str(key))


def attach(model: nnx.Module, tape: Tape, prefix: str = "") -> None:
    """Let `tape` listen to `model`, a copy that was merged for this trace and dies with it."""
    for path, module in tapped_modules(model, prefix):
        module.tape = tape
        if module.name is None:
            module.name = path + module.suffix


def gather_weights(module: nnx.Module, axes: tuple[str, ...]) -> None:
    """Replace, in place, each sharded parameter by the whole of it.

    A parameter says in its metadata along which axis it is sharded (`jhessians.devices.mesh`).
    Stacks are passed over: their scan gathers one layer at a time.

    Args:
        module: A module merged inside `shard_map`, its arrays this device's shards.
        axes: The mesh axes that the shards lie on.
    """
    if not axes or getattr(module, "scans", False):
        return
    for name, value in vars(module).items():
        if isinstance(value, nnx.Variable) and value.get_metadata().get("sharded_axis"):
            whole = value[...]
            axis = whole.ndim + value.get_metadata()["sharded_axis"]
            for mesh_axis in reversed(axes):
                whole = lax.all_gather(whole, mesh_axis, axis=axis, tiled=True)
            setattr(module, name, value.replace(whole))
    for _, child in nnx.iter_module_children(module):
        gather_weights(child, axes)


def product(x: Array, kernel: Array, routing: Routing | None = None) -> Array:
    """x @ kernel, or of every expert's rows with its own kernel."""
    return x @ kernel if routing is None else grouped_product(x, kernel, routing.sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(fold, site, x, kernel, statistics, operands, context, layer, routing):
    return product(x, kernel, routing), statistics


def _tap_forward(fold, site, x, kernel, statistics, operands, context, layer, routing):
    y = product(x, kernel, routing)
    return (y, statistics), (x, kernel, operands, context, layer, routing)


def _tap_backward(fold, site, residuals, cotangents):
    x, kernel, operands, context, layer, routing = residuals
    g, statistics = cotangents
    if routing is None:

        def term(operands):
            return fold.term(site, _as_documents(x), _as_documents(g), operands, context)

        statistics = _add(fold, site, term, statistics, operands, context, layer)
    else:
        statistics = _add_experts(fold, site, x, g, statistics, operands, context, layer, routing)
    return product(g, kernel.swapaxes(-1, -2), routing), None, statistics, None, None, None, None


_tap.defvjp(_tap_forward, _tap_backward)


def _as_documents(x: Array) -> Array:
    """[document, position, feature] of an array with any number of position axes."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _add_experts(fold, site, x, g, statistics, operands, context, layer, routing):
    """`statistics` plus the terms of all experts of a layer, each from the rows routed to it."""
    experts, documents = routing.counts.shape
    tokens = routing.row.shape[0]
    mask = jnp.ones(tokens, bool) if context.mask is None else context.mask.reshape(-1)

    def step(statistics, expert):
        def term(operands):
            def of_grid(rows, there):
                here = replace(context, mask=there & mask[routing.token[rows]])
                # Zeros where there is no row, as in padding, also for a fold that has no masks.
                a_nsi, g_nso = (jnp.where(there[..., None], t[rows], 0) for t in (x, g))
                return fold.term(site, a_nsi, g_nso, operands, here)

            width = tokens // documents
            return over_grid(of_grid, routing, expert, positions=width, axes=context.axes)

        member = expert if layer is None else layer * experts + expert
        return _add(fold, site, term, statistics, operands, context, member), None

    return lax.scan(step, statistics, jnp.arange(experts))[0]


def _add(fold, site, term, statistics, operands, context, member):
    """`statistics` plus the term of a stack's `member`, if that is recorded."""

    def add(statistics, operands, slot):
        if slot is not None:
            take = lambda x: lax.dynamic_index_in_dim(x, slot, keepdims=False)  # noqa: E731
            operands = jax.tree.map(take, operands)
        if isinstance(fold, JointFold):  # rows of this device's documents, no sums
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), statistics, term(operands))
        return add_scattered(statistics, term(operands), context, slot)

    if site.members is None or len(site.members) == site.stack_size:
        return add(statistics, operands, member)
    slots = np.full(site.stack_size, -1, np.int32)
    slots[list(site.members)] = np.arange(len(site.members))
    slot = jnp.asarray(slots)[member]
    return lax.cond(slot >= 0, add, lambda s, *_: s, statistics, operands, jnp.maximum(slot, 0))


def add_scattered(
    statistics: PyTree[Array], term: PyTree[Array], context: Context, slot: Array | None = None
) -> PyTree[Array]:
    """`statistics` plus the sum of `term` over devices, in the rows that this device keeps.

    Args:
        statistics: Running sums.
        term: This device's.
        context: Mesh and weight.
        slot: The entry, where `statistics` has a leading member axis.
    """

    def add(total: Array, x: Array) -> Array:
        x = x.astype(total.dtype)
        rows = context.scatter_rows(x if context.weight == 1 else x * context.weight)
        return total + rows if slot is None else total.at[slot].add(rows)

    return jax.tree.map(add, statistics, term)
