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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.capture.checks import require_fit, require_shapes
from jhessians.capture.documents import DocumentContext, PerDocument, PerDocumentJointly
from jhessians.capture.fold import Context, Fold, JointFold, Matrices
from jhessians.capture.linears import attach
from jhessians.capture.problem import Problem, keep_activations
from jhessians.capture.shards import gather_weights
from jhessians.capture.site import Operands, Site, Statistics
from jhessians.capture.tape import Tape
from jhessians.capture.taps import add_scattered
from jhessians.devices.mesh import (
    AnyMesh,
    axis_names,
    parameter_specs,
    platform_of,
    where_explicit,
)
from jhessians.devices.precision import multiplying
from jhessians.typing import Array, DTypeLike, Float, PyTree


def initialize(
    fold: Fold | JointFold, problem: Problem, *, dtype: DTypeLike | None = None
) -> Statistics:
    """The statistics before the first batch: zeros, their rows padded and sharded over the mesh.

    Args:
        fold: What will be summed.
        problem: Its sites and mesh; neither loss nor model is looked at.
        dtype: Number format of the sums; by default the one that the fold's shapes name.

    Returns:
        Zeros, for `accumulate` to add to; `unpack` makes whole arrays of what it gives.

    Raises:
        FoldError: If one of the fold's statistics is a scalar or no shape.
        ValueError: If the problem has no linears.
    """
    require_shapes(fold, problem)
    sites, mesh = problem.sites, problem.mesh
    context = _context(fold, mesh)

    def zeros(site: Site | None, shape: jax.ShapeDtypeStruct) -> Array:
        members = () if site is None or site.members is None else (len(site.members),)
        rows = context.padded(shape.shape[0])
        return jnp.zeros((*members, rows, *shape.shape[1:]), dtype or shape.dtype)

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
    zeroed: Statistics = jax.jit(statistics, out_shardings=shardings)()
    return zeroed


def accumulate(
    fold: Fold | JointFold,
    problem: Problem,
    batch: PyTree,
    statistics: Statistics,
    *,
    operands: Operands | None = None,
) -> tuple[Statistics, Float[Array, ""]]:
    """Add one batch's terms to the statistics.

    Jit it with `statistics` donated and the sums are updated in place. The fold is checked, without
    computing anything, each time that this is traced.

    Args:
        fold: What to compute at every linear.
        problem: Loss, model, linears and devices.
        batch: A pytree whose arrays have documents as their first axis, a multiple of the mesh.
        statistics: From `initialize`, or from the batch before.
        operands: Per site, further arrays that the fold needs, rows sharded like statistics.

    Returns:
        The new statistics, and the batch's loss, the mean over the draws of labels.

    Raises:
        FoldError: If a term has another shape than the fold's `shapes` says, an operand is missing,
            or the statistics are those of another fold or of other linears.
        ValueError: If the loss returns another number of losses than the problem's draws, calls
            other linears than it did when sites were found, or calls them in a way that the fold
            can't add up; if a joint fold gets no mask, the mask isn't [document, position], the
            documents can't be divided among the devices, or there are no linears.
        ConfigError: If the device doesn't multiply in the problem's precision.
    """
    sites, mesh, mask = problem.sites, problem.mesh, problem.mask(batch)
    mask = None if mask is None else jnp.asarray(mask, bool)
    documents = len(jax.tree.leaves(batch)[0])
    if isinstance(fold, JointFold) and mask is None:
        raise ValueError(f"{fold.joint} rows need the mask of the positions that count")
    if mask is not None and (mask.ndim != 2 or len(mask) != documents):
        raise ValueError(
            f"the mask has shape {list(mask.shape)}; expected [document, position], of {documents} "
            "documents"
        )
    require_fit(
        fold, problem, statistics, documents=documents,
        positions=None if mask is None else mask.shape[1], operands=operands,
    )  # fmt: skip
    context = replace(_context(fold, mesh), weight=1 / problem.draws)
    graph, state = nnx.split(problem.model)

    def local(
        state: nnx.State[Any, Any],
        batch: PyTree[Array],
        mask: Array | None,
        statistics: Statistics,
        operands: Operands,
    ) -> tuple[Statistics, Array]:
        def forward(statistics: Statistics) -> tuple[Array, Statistics]:
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
            assert mask is not None  # as is checked above
            threaded = {fold.joint: fold.row_shapes(*mask.shape)}
        # The zeros are never read: only their cotangent, the running sum, exists in memory.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), threaded)
        (value, _), pullback = jax.vjp(forward, zeros)
        if value.size != problem.draws:
            raise ValueError(f"the loss has shape {value.shape}; expected {problem.draws} losses")

        def backward(statistics: Statistics, draw: Array) -> tuple[Statistics, None]:
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
        by_document = P(axis_names(mesh))
        specs = (
            parameter_specs(state, mesh),
            by_document,
            by_document,
            rows,
            row_specs(sites, operands, mesh),
        )
        arguments = where_explicit(mesh, specs, arguments)
        return jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=(rows, P()), check_vma=False
        )(*arguments)


def row_specs(sites: Mapping[str, Site], arrays: Mapping[str, Any], mesh: AnyMesh) -> PyTree[P]:
    """The specs of statistics and operands, which are sharded by rows.

    Rows are the first axis or, in a stack, the axis behind the member axis; of `Matrices` the next.

    Args:
        sites: The linears, of which some are stacks.
        arrays: Statistics or operands, or their shapes, by site; another name is a joint fold's.
        mesh: The devices, whose axes all share the rows.

    Returns:
        A spec in the place of each array.
    """
    rows = axis_names(mesh)

    def specs(name: str, tree: PyTree) -> PyTree[P]:
        stacked = [None] * (name in sites and sites[name].members is not None)

        def spec(x: Any) -> Any:
            if isinstance(x, Matrices):
                return Matrices(P(*stacked, None, rows))
            return P(*stacked, rows)

        return jax.tree.map(spec, tree, is_leaf=lambda x: isinstance(x, Matrices))

    return {name: specs(name, tree) for name, tree in arrays.items()}


def row_shardings(sites: Mapping[str, Site], arrays: Mapping[str, Any], mesh: AnyMesh) -> PyTree:
    """The shardings that `row_specs` describes, as `NamedSharding`s; arguments as there."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        row_specs(sites, arrays, mesh),
        is_leaf=lambda x: isinstance(x, P),
    )


def shaped_rows(
    sites: Mapping[str, Site], shapes: Mapping[str, Any], mesh: AnyMesh | None
) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes of statistics or operands, with their shardings if there is a mesh.

    Args:
        sites: The linears.
        shapes: By site, rows already padded.
        mesh: The devices; None for a single one.

    Returns:
        `shapes`, each of them with a sharding by rows.
    """
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        row_shardings(sites, shapes, mesh),
    )


def _context(fold: Fold | JointFold, mesh: AnyMesh | None) -> Context:
    summed = not isinstance(fold, PerDocument | PerDocumentJointly)
    form = Context if summed else DocumentContext
    if mesh is None:
        return form()
    return form(axes=axis_names(mesh), shards=mesh.size, tiled=platform_of(mesh) == "tpu")
