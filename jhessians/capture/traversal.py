"""The one forward/backward pass that drives every fold.

    tokens → embed → scan over blocks → norm, head, loss          (forward)
                 ↖ jax.vjp, block by block, inside shard_map ↙     (backward)
                          at every linear: fold(a, g)

Everything here is a pure function of pytrees that can stand inside a caller's own `jax.jit`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.capture.fold import Context, Fold, JointFold
from jhessians.capture.linears import attach
from jhessians.capture.problem import Problem, keep_activations
from jhessians.capture.site import Operands, Site, Statistics
from jhessians.capture.tape import Tape, gather_weights
from jhessians.capture.taps import add_scattered
from jhessians.devices.mesh import axis_names, parameter_specs
from jhessians.devices.precision import multiplying
from jhessians.typing import Array, DTypeLike, Float, PyTree


def initialize(
    fold: Fold | JointFold, problem: Problem, *, dtype: DTypeLike = jnp.float32
) -> Statistics:
    """The statistics before the first batch: zeros, their rows padded and sharded over the mesh.

    Args:
        fold: What will be summed.
        problem: Gives the sites and the mesh; its loss and model are not used.
        dtype: Number format of the sums.
    """
    sites, mesh = problem.sites, problem.mesh
    context = _context(mesh)

    def zeros(site: Site | None, shape: jax.ShapeDtypeStruct) -> Array:
        members = () if site is None or site.members is None else (len(site.members),)
        rows = context.padded(shape.shape[0])
        return jnp.zeros((*members, rows, *shape.shape[1:]), dtype)

    def statistics() -> Statistics:
        if isinstance(fold, JointFold):
            return {fold.joint: jax.tree.map(partial(zeros, None), fold.shapes())}
        return {
            name: jax.tree.map(partial(zeros, site), fold.shapes(site))
            for name, site in sites.items()
        }

    if mesh is None:
        return statistics()
    shardings = row_shardings(sites, jax.eval_shape(statistics), mesh)
    return jax.jit(statistics, out_shardings=shardings)()


def accumulate(
    fold: Fold | JointFold,
    problem: Problem,
    batch: PyTree,
    statistics: Statistics,
    *,
    operands: Operands | None = None,
) -> tuple[Statistics, Float[Array, ""]]:
    """Add one batch's terms to the statistics.

    Jit it with `statistics` donated and the sums are updated in place.

    Args:
        fold: What to compute at every linear.
        problem: Loss, model, linears and devices.
        batch: A pytree whose arrays have documents as their first axis, a multiple of the mesh.
        statistics: From `initialize`, or from the batch before.
        operands: Per site, further arrays that the fold needs, rows sharded like statistics.

    Returns:
        The new statistics, and the batch's loss, the mean over the draws of labels.

    Raises:
        ValueError: If the loss returns another number of losses than the problem's draws, if it
            calls other linears than it did when sites were found or calls them in a way that the
            fold can't add up, or if a joint fold gets no mask.
        ConfigError: If the device doesn't multiply in the problem's precision.
    """
    sites, mesh, mask = problem.sites, problem.mesh, problem.mask(batch)
    if isinstance(fold, JointFold) and mask is None:
        raise ValueError(f"{fold.joint} rows need the mask of the positions that count")
    context = replace(_context(mesh), weight=1 / problem.draws)
    graph, state = nnx.split(problem.model)

    def local(state, batch, mask, statistics, operands):
        def forward(statistics):
            copy = nnx.merge(graph, state, copy=True)  # so that layers may write to it
            keep_activations(copy, problem.activations)
            tape = Tape(fold, sites, statistics, operands, replace(context, mask=mask))
            attach(copy, tape)
            gather_weights(copy, context.axes)
            value = problem.loss(copy, batch)
            return value, tape.close()

        # The linears add to the running sums, or to the rows of a joint fold.
        threaded = statistics
        if isinstance(fold, JointFold):
            threaded = {fold.joint: fold.row_shapes(*mask.shape)}
        # The zeros are never read: only their cotangent, the running sum, exists in memory.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), threaded)
        (value, _), pullback = jax.vjp(forward, zeros)
        if value.size != problem.draws:
            raise ValueError(f"the loss has shape {value.shape}; expected {problem.draws} losses")

        def backward(statistics, draw):
            draw = draw.reshape(value.shape)
            if isinstance(fold, JointFold):
                (rows,) = pullback((draw, zeros))
                term = {fold.joint: fold.finish_rows(rows[fold.joint])}
                return add_scattered(statistics, term, context), None
            (statistics,) = pullback((draw, statistics))
            return statistics, None

        # One backward pass for each loss of a vector of them, all from one forward pass.
        statistics, _ = lax.scan(backward, statistics, jnp.eye(value.size, dtype=value.dtype))
        mean = value.mean()
        return statistics, lax.psum(mean, context.axes) if context.axes else mean

    batch, mask, operands = jax.tree.map(jnp.asarray, (batch, mask, operands or {}))
    arguments = (state, batch, mask, statistics, operands)
    with multiplying(problem.matmul_precision, mesh):
        if mesh is None:
            return local(*arguments)
        rows = row_specs(sites, statistics, mesh)
        documents = P(axis_names(mesh))
        specs = (
            parameter_specs(state, mesh),
            documents,
            documents,
            rows,
            row_specs(sites, operands, mesh),
        )
        if AxisType.Explicit in mesh.axis_types:  # there arrays must be moved in so many words
            arguments = jax.tree.map(
                lambda spec, tree: jax.device_put(tree, NamedSharding(mesh, spec)),
                specs, arguments, is_leaf=lambda x: isinstance(x, P),
            )  # fmt: skip
        return jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=(rows, P()), check_vma=False
        )(*arguments)


def row_specs(sites: Mapping[str, Site], arrays: Mapping[str, Any], mesh: Mesh) -> PyTree[P]:
    """The specs of statistics and operands: sharded by rows, the first axis or, in a stack, the
    axis behind the member axis."""
    rows = axis_names(mesh)

    def specs(name: str, tree: PyTree) -> PyTree[P]:
        stacked = name in sites and sites[name].members is not None
        return jax.tree.map(lambda _: P(None, rows) if stacked else P(rows), tree)

    return {name: specs(name, tree) for name, tree in arrays.items()}


def row_shardings(sites: Mapping[str, Site], arrays: Mapping[str, Any], mesh: Mesh) -> PyTree:
    """The shardings that `row_specs` describes, as `NamedSharding`s."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        row_specs(sites, arrays, mesh),
        is_leaf=lambda x: isinstance(x, P),
    )


def shaped_rows(
    sites: Mapping[str, Site], shapes: Mapping[str, Any], mesh: Mesh | None
) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes of statistics or operands, with their shardings if there is a mesh."""
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        row_shardings(sites, shapes, mesh),
    )


def _context(mesh: Mesh | None) -> Context:
    return Context() if mesh is None else Context(axes=axis_names(mesh), shards=mesh.size)
