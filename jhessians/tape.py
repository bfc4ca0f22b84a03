"""The mechanism that shows every linear's input and output gradient to a fold.

A `Tape` travels with one forward pass and threads the running statistics through it. Each tapped
linear is a `jax.custom_vjp` that hands the statistics on unchanged; in the backward pass their
*cotangent* is the running sum, to which the linear adds its fold's term. So `jax.vjp`, started
from the sums accumulated so far, returns the new sums in place: no weight gradient exists, no
second copy of a factor exists, and no backward pass is written by hand.

a: [document, position, in], a linear's input. g: [document, position, out], the loss gradient at
its output.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jhessians.experts import Routing, grouped_product, over_grid
from jhessians.typing import Array, Float, PyTree, Shaped

Statistics = dict[str, Any]  # site name -> the fold's pytree, with a leading member axis in stacks


@dataclass(frozen=True)
class Site:
    """A linear layer, or all of a stack's linears of one name, as a fold sees it.

    A stack has a linear for each of its layers, or for each expert of each layer.

    Attributes:
        name: Its name; `{layer}` and `{expert}` stand for numbers.
        in_features: I.
        out_features: O.
        use_bias: Whether it has a bias.
        ones: Whether the bias counts as one more input, always one: I' = I + 1.
        stack: The stack's axes, each with its length, such as (("layer", 12), ("expert", 8));
            none outside a stack.
        members: Which of the stack's linears are recorded, ascending: indices into its axes
            flattened; None outside a stack.
        input_site: The site that keeps what depends on the input alone: this one, or an earlier
            one that reads the same array, as key and value do with query.
    """

    name: str
    in_features: int
    out_features: int
    use_bias: bool
    ones: bool = False
    stack: tuple[tuple[str, int], ...] = ()
    members: tuple[int, ...] | None = None
    input_site: str = ""

    @property
    def inputs(self) -> int:
        """I', the columns of `a` and of the weight gradient."""
        return self.in_features + self.ones

    @property
    def owns_input(self) -> bool:
        return self.input_site == self.name

    @property
    def routed(self) -> bool:
        """Whether its linears are experts, each of which reads some of the positions."""
        return any(axis == "expert" for axis, _ in self.stack)

    @property
    def stack_size(self) -> int:
        """How many linears the stack has, recorded or not."""
        return math.prod(length for _, length in self.stack)

    @property
    def slots(self) -> list[int | None]:
        """Where its arrays' leading axis has each of its modules; None outside a stack."""
        return [None] if self.members is None else list(range(len(self.members)))

    def module_names(self) -> list[str]:
        """The full names of the modules that this site stands for, in the order of its arrays."""
        if self.members is None:
            return [self.name]
        axes, lengths = zip(*self.stack, strict=True)
        indices = (np.unravel_index(member, lengths) for member in self.members)
        return [self.name.format(**dict(zip(axes, index, strict=True))) for index in indices]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a fold may know of the batch on its device.

    Attributes:
        mask: The positions that count, [document, position]; None if all do.
        axes: The mesh axes that rows are sharded over; none on a single device.
        shards: The product of their sizes.
        weight: Of every term; the traversal multiplies by it.
    """

    mask: Any = None
    axes: tuple[str, ...] = field(default=(), metadata={"static": True})
    shards: int = field(default=1, metadata={"static": True})
    weight: float = field(default=1.0, metadata={"static": True})

    def padded(self, rows: int) -> int:
        """`rows` rounded up to a multiple of the shards."""
        return -(-rows // self.shards) * self.shards

    def gather_rows(self, x: Shaped[Array, "local *rest"], rows: int) -> Shaped[Array, "r *rest"]:
        """All `rows` rows of an operand that is sharded by rows."""
        for axis in reversed(self.axes):
            x = lax.all_gather(x, axis, axis=0, tiled=True)
        return x[:rows]

    def scatter_rows(self, x: Float[Array, "r *rest"]) -> Float[Array, "local *rest"]:
        """This device's rows of the sum of `x` over devices."""
        if missing := self.padded(x.shape[0]) - x.shape[0]:
            x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        # One axis in turn: over several at once XLA makes it an all-reduce of the whole array.
        for axis in self.axes:
            x = lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        return x


@runtime_checkable
class Fold(Protocol):
    """A sum over documents of something that (a, g) give. One method, one file.

    A fold is a static argument of jit: make it a frozen dataclass.
    """

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """The statistics of one linear. Every array has rows, which the mesh shards."""
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """What this device's documents add, in the structure of `shapes`.

        Args:
            site: The linear.
            a: [document, position, in], without the column of ones.
            g: [document, position, out].
            operands: Arrays that belong to this linear, such as its eigenvectors, sharded by rows.
            context: Mask and mesh.
        """
        ...


@runtime_checkable
class JointFold(Protocol):
    """A fold to whose rows, one or more for each document, every linear adds its share.

    Its statistic is one for all linears: a function of the rows that are the sums of all shares,
    such as their Gram. While a batch is on its way there are only the rows, and only those of the
    device's own documents.

    Attributes:
        joint: The statistic's name.
    """

    joint: str

    def shapes(self) -> PyTree[jax.ShapeDtypeStruct]:
        """The statistic. Every array has rows, which the mesh shards."""
        ...

    def row_shapes(self, documents: int, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """The rows of a batch on one device."""
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """A linear's share of the rows; arguments as in `Fold.term`."""
        ...

    def finish_rows(self, rows: PyTree[Array]) -> PyTree[Array]:
        """What this device's documents add to the statistic."""
        ...


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

    A parameter says in its metadata along which axis it is sharded (`jhessians.mesh`). Stacks are
    passed over: their scan gathers one layer at a time.

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
