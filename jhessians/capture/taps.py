"""The custom derivatives by which a linear adds its term to the running statistics.

The statistics pass through a `jax.custom_vjp` unchanged; in the backward pass their *cotangent* is
the running sum, to which the linear adds its fold's term. There are two kinds:

    tap       computes a linear's product itself; for one call
    collect   opens a linear for one or more calls, each of which reports its input and output
    report    gradient; when all have, `collect` adds one term of all calls' positions

A document's gradient is Σ g aᵀ over the positions of all calls that share the weight, so a fold
that squares documents' gradients must see the calls together.

a: [document, position, in], a linear's input. g: [document, position, out], the loss gradient at
its output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jhessians.capture.fold import Context, Fold, JointFold
from jhessians.capture.routing import Routing, grouped_product, over_grid
from jhessians.capture.shards import Shards, whole
from jhessians.capture.site import Site
from jhessians.typing import Array, PyTree

Call = tuple[Array, Array]
"""A linear's input and the loss gradient at its output, or arrays of their forms."""


def product(x: Array, kernel: Array | Shards, routing: Routing | None = None) -> Array:
    """x @ kernel; with a routing, each expert's rows times the kernel of that expert.

    Args:
        x: [document, position..., in], or with a routing [row, in].
        kernel: [in, out], or with a routing [expert, in, out].
        routing: Which rows are of which expert; then of a kernel's shards one expert's is gathered
            at a time.

    Returns:
        [document, position..., out], or with a routing [row, out].
    """
    if routing is None:
        return x @ whole(kernel)
    return grouped_product(x, kernel, routing.sizes, backward_only=routing.backward_only)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tap(
    fold: Fold | JointFold,
    site: Site,
    x: Array,
    kernel: Array | Shards,
    statistics: PyTree[Array],
    operands: Mapping[str, Any],
    context: Context,
    layer: Array | None,
    routing: Routing | None,
) -> tuple[Array, PyTree[Array]]:
    """Multiply, and add the linear's term to the statistics in the backward pass.

    Args:
        fold: What is computed there.
        site: The linear.
        x: As `product` gets it.
        kernel: As `product` gets it; it has no gradient.
        statistics: The running sums of this site.
        operands: Further arrays that the fold reads, in stacks with a leading member axis.
        context: What the fold may know of the batch.
        layer: Inside a stack, the number of the layer.
        routing: Which rows are of which expert.

    Returns:
        `product(x, kernel, routing)`, and the statistics as they are, to whose cotangent the term
        is added.
    """
    return product(x, kernel, routing), statistics


def _tap_forward(
    fold: Fold | JointFold,
    site: Site,
    x: Array,
    kernel: Array | Shards,
    statistics: PyTree[Array],
    operands: Mapping[str, Any],
    context: Context,
    layer: Array | None,
    routing: Routing | None,
) -> tuple[tuple[Array, PyTree[Array]], tuple[Any, ...]]:
    y = product(x, kernel, routing)
    return (y, statistics), (x, kernel, operands, context, layer, routing)


def _tap_backward(
    fold: Fold | JointFold,
    site: Site,
    residuals: tuple[Any, ...],
    cotangents: tuple[Array, PyTree[Array]],
) -> tuple[Any, ...]:
    x, kernel, operands, context, layer, routing = residuals
    g, statistics = cotangents
    if routing is None:
        statistics = _add_calls(fold, site, [(x, g)], statistics, operands, context, layer)
    else:
        statistics = _add_experts(fold, site, x, g, statistics, operands, context, layer, routing)
    return product(g, kernel.swapaxes(-1, -2), routing), None, statistics, None, None, None, None


tap.defvjp(_tap_forward, _tap_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def collect(
    fold: Fold | JointFold,
    site: Site,
    statistics: PyTree[Array],
    slots: list[Call],
    operands: Mapping[str, Any],
    context: Context,
    layer: Array | None,
) -> tuple[PyTree[Array], list[Call]]:
    """Open a linear for calls that will each `report` what they see.

    In the backward pass the slots' cotangents are what the calls reported, and one term of all of
    them is added to the statistics' cotangent.

    Args:
        fold: What is computed there.
        site: The linear.
        statistics: The running sums of this site.
        slots: For each call to come, zeros of the forms of its input and its output.
        operands: Further arrays that the fold reads, in stacks with a leading member axis.
        context: What the fold may know of the batch.
        layer: Inside a stack, the number of the layer.

    Returns:
        The statistics as they are, and the slots, each of which goes to one `report`.
    """
    return statistics, slots


def _collect_forward(
    fold: Fold | JointFold,
    site: Site,
    statistics: PyTree[Array],
    slots: list[Call],
    operands: Mapping[str, Any],
    context: Context,
    layer: Array | None,
) -> tuple[tuple[PyTree[Array], list[Call]], tuple[Any, ...]]:
    return (statistics, slots), (operands, context, layer)


def _collect_backward(
    fold: Fold | JointFold,
    site: Site,
    residuals: tuple[Any, ...],
    cotangents: tuple[PyTree[Array], list[Call]],
) -> tuple[Any, ...]:
    operands, context, layer = residuals
    statistics, calls = cotangents
    statistics = _add_calls(fold, site, calls, statistics, operands, context, layer)
    return statistics, None, None, None, None


collect.defvjp(_collect_forward, _collect_backward)


@jax.custom_vjp
def report(x: Array, y: Array, slot: Call) -> Array:
    """Report one call of a linear in the backward pass.

    Args:
        x: The linear's input.
        y: Its output.
        slot: One of those that `collect` returned; its cotangent is x and the gradient at y.

    Returns:
        y, which the caller must go on with.
    """
    return y


report.defvjp(lambda x, y, slot: (y, x), lambda x, g: (None, g, (x, g)))


def _add_calls(
    fold: Fold | JointFold,
    site: Site,
    calls: Sequence[Call],
    statistics: PyTree[Array],
    operands: Mapping[str, Any],
    context: Context,
    layer: Array | None,
) -> PyTree[Array]:
    """`statistics` plus the term of the calls' positions, one call's after the other's."""
    a, g = (
        pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, 1)
        for pieces in ([_as_documents(x) for x in each] for each in zip(*calls, strict=True))
    )
    if context.mask is not None:
        mask = jnp.concatenate([context.mask] * len(calls), 1) if len(calls) > 1 else context.mask
        if mask.shape != a.shape[:2]:
            raise ValueError(
                f"{site.name} reads {a.shape[1]} positions of {a.shape[0]} documents where the "
                f"mask has {mask.shape[1]} of {mask.shape[0]}; give a mask of the same positions, "
                "or leave it out"
            )
        context = replace(context, mask=mask)

    def term(operands: Mapping[str, Any]) -> PyTree[Array]:
        return fold.term(site, a, g, operands, context)

    return _add(fold, site, term, statistics, operands, context, layer)


def _as_documents(x: Array) -> Array:
    """[document, position, feature] of an array with any number of position axes."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _add_experts(
    fold: Fold | JointFold,
    site: Site,
    x: Array,
    g: Array,
    statistics: PyTree[Array],
    operands: Mapping[str, Any],
    context: Context,
    layer: Array | None,
    routing: Routing,
) -> PyTree[Array]:
    """`statistics` plus the terms of all experts of a layer, each from the rows routed to it."""
    experts, documents = routing.counts.shape
    tokens = routing.row.shape[0]
    mask = jnp.ones(tokens, bool) if context.mask is None else context.mask.reshape(-1)

    def step(statistics: PyTree[Array], expert: Array) -> tuple[PyTree[Array], None]:
        def term(operands: Mapping[str, Any]) -> PyTree[Array]:
            def of_grid(rows: Array, there: Array) -> PyTree[Array]:
                here = replace(context, mask=there & mask[routing.token[rows]])
                # Zeros where there is no row, as in padding, also for a fold that has no masks.
                a_nsi, g_nso = (jnp.where(there[..., None], t[rows], 0) for t in (x, g))
                return fold.term(site, a_nsi, g_nso, operands, here)

            width = tokens // documents
            return over_grid(of_grid, routing, expert, positions=width, axes=context.axes)

        member = expert if layer is None else layer * experts + expert
        return _add(fold, site, term, statistics, operands, context, member), None

    return lax.scan(step, statistics, jnp.arange(experts))[0]


def _add(
    fold: Fold | JointFold,
    site: Site,
    term: Callable[[Mapping[str, Any]], PyTree[Array]],
    statistics: PyTree[Array],
    operands: Mapping[str, Any],
    context: Context,
    member: Array | None,
) -> PyTree[Array]:
    """`statistics` plus the term of a stack's `member`, if that one is recorded."""

    def add(
        statistics: PyTree[Array], operands: Mapping[str, Any], slot: Array | None
    ) -> PyTree[Array]:
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
        statistics: The running sums.
        term: What this device adds.
        context: Holds the mesh and the weight of the term.
        slot: The index on the leading member axis of `statistics`, where there is one.

    Returns:
        The new sums.
    """

    def add(total: Array, x: Array) -> Array:
        x = x.astype(total.dtype)
        kept = total.shape if slot is None else total.shape[1:]
        rows = context.scatter_rows(x if context.weight == 1 else x * context.weight, kept)
        return total + rows if slot is None else total.at[slot].add(rows)

    return jax.tree.map(add, statistics, term)
