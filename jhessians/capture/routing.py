"""Products of rows that are grouped by expert, and how folds see an expert's rows by document.

A mixture of experts routes every token to a few of its experts. Each choice of an expert by a token
makes one row, a copy of the token. Rows are sorted by expert, then by document, then by position:
the rows of an expert are contiguous, and so are a document's rows among them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.capture.shards import Shards, whole
from jhessians.typing import Array, Bool, Float, Int, PyTree


class Routing(NamedTuple):
    """Which expert reads which tokens.

    The token at a position of a document has the number t = document · S + position. It makes k
    choices, and the c-th of them has the number t · k + c.

    Attributes:
        choice: The number of the choice that each row stands for.
        row: The number of the row that stands for each choice, [t, k].
        counts: How many rows each expert has from each document, [expert, document].
    """

    choice: Int[Array, " r"]
    row: Int[Array, "t k"]
    counts: Int[Array, "e n"]

    @property
    def backward_only(self) -> bool:
        """Whether derivatives of what is routed are taken backwards alone, by rules of its own."""
        return True

    @property
    def token(self) -> Int[Array, " r"]:
        """The number of the token that each row copies."""
        return self.choice // self.row.shape[1]

    @property
    def sizes(self) -> Int[Array, " e"]:
        """How many rows each expert has."""
        return self.counts.sum(1, dtype=jnp.int32)


class ForwardRouting(Routing):
    """A routing where derivatives are taken forwards alone."""

    @property
    def backward_only(self) -> bool:
        """See `Routing`."""
        return False


def route(choices: Int[Array, "n s k"], experts: int, *, backward_only: bool = True) -> Routing:
    """The routing that follows from the tokens' choices.

    Args:
        choices: The experts that each token chooses, all different.
        experts: How many experts there are.
        backward_only: See `Routing`.

    Returns:
        The routing, with n · s · k rows.
    """
    n, s, k = choices.shape
    flat = choices.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    chosen = jax.nn.one_hot(choices.reshape(n, s * k), experts, dtype=jnp.int32)
    kind = Routing if backward_only else ForwardRouting
    return kind(
        order.astype(jnp.int32),
        jnp.argsort(order).astype(jnp.int32).reshape(n * s, k),
        chosen.sum(1, dtype=jnp.int32).T,
    )


def dispatch(tokens: Float[Array, "t d"], routing: Routing) -> Float[Array, "r d"]:
    """Copies of the tokens, one for each row.

    The derivative is written out as a gather, too; JAX would make a slower scatter of it.

    Args:
        tokens: One vector for each token.
        routing: Which token each row copies.

    Returns:
        The rows, sorted by expert.
    """
    return (_dispatch if routing.backward_only else _dispatched)(tokens, routing)


def _dispatched(tokens: Array, routing: Routing) -> Array:
    return tokens[routing.token]


_dispatch = jax.custom_vjp(_dispatched)
_dispatch.defvjp(
    lambda tokens, routing: (tokens[routing.token], routing),
    lambda routing, g: (g[routing.row].sum(1), None),
)


def collect(rows: Float[Array, "r d"], routing: Routing) -> Float[Array, "t k d"]:
    """The rows of each token, in the order of its choices.

    Args:
        rows: One vector for each row, sorted by expert, such as what the experts return.
        routing: Which rows are whose.

    Returns:
        k rows of each token.
    """
    return (_collect if routing.backward_only else _collected)(rows, routing)


def _collected(rows: Array, routing: Routing) -> Array:
    return rows[routing.row]


_collect = jax.custom_vjp(_collected)
_collect.defvjp(
    lambda rows, routing: (rows[routing.row], routing),
    lambda routing, g: (g.reshape(-1, g.shape[-1])[routing.choice], None),
)


def grouped_product(
    x: Float[Array, "r i"],
    kernels: Float[Array, "e i o"] | Shards,
    sizes: Int[Array, " e"],
    *,
    backward_only: bool = True,
) -> Float[Array, "r o"]:
    """The rows of each group times the kernel of that group.

    A group's rows are multiplied in blocks of equal size. (`lax.ragged_dot` multiplies all rows
    with all kernels on CPU: 16 experts took 8 times as long.)

    Args:
        x: Rows, group after group.
        kernels: The kernel of each group; of shards, one group's is gathered at a time.
        sizes: How many rows each group has.
        backward_only: See `Routing`.

    Returns:
        The products, in the order of `x`.
    """
    return (_product if backward_only else _blockwise)(x, kernels, sizes)


def _blockwise(x: Array, kernels: Array | Shards, sizes: Array) -> Array:
    rows, size = x.shape[0], _block_rows(x.shape[0], len(kernels))
    x = jnp.pad(x, ((0, size), (0, 0)))

    def group(y: Array, step: tuple[Array | Shards, Array, Array]) -> tuple[Array, None]:
        kernel, first, count = whole(step[0]), *step[1:]

        def block(k: Array, y: Array) -> Array:
            # A last block that reaches into the next group's rows is overwritten by that group.
            start = first + k * size
            product = lax.dynamic_slice_in_dim(x, start, size) @ kernel
            return lax.dynamic_update_slice_in_dim(y, product, start, 0)

        return lax.fori_loop(0, -(-count // size), block, y), None

    y = jnp.zeros((rows + size, kernels.shape[-1]), x.dtype)
    return lax.scan(group, y, (kernels, _starts(sizes), sizes))[0][:rows]


_product = jax.custom_vjp(_blockwise)


def _product_forward(
    x: Array, kernels: Array | Shards, sizes: Array
) -> tuple[Array, tuple[Array, Array | Shards, Array]]:
    return _blockwise(x, kernels, sizes), (x, kernels, sizes)


def _product_backward(
    residuals: tuple[Array, Array | Shards, Array], g: Array
) -> tuple[Array, Array | None, None]:
    x, kernels, sizes = residuals
    backwards = _blockwise(g, kernels.swapaxes(-1, -2), sizes)
    if isinstance(kernels, Shards):  # as they are where weights are constants alone
        return backwards, None, None
    size = _block_rows(x.shape[0], len(kernels))
    padded_x, padded_g = (jnp.pad(t, ((0, size), (0, 0))) for t in (x, g))

    def group(_: None, step: tuple[Array, Array]) -> tuple[None, Array]:
        first, count = step

        def block(k: Array, total: Array) -> Array:
            start = first + k * size
            here = (k * size + jnp.arange(size, dtype=count.dtype) < count)[:, None]
            block_x = lax.dynamic_slice_in_dim(padded_x, start, size)
            block_g = lax.dynamic_slice_in_dim(padded_g, start, size)
            return total + jnp.where(here, block_x, 0).T @ block_g

        zeros = jnp.zeros(kernels.shape[1:], kernels.dtype)
        return None, lax.fori_loop(0, -(-count // size), block, zeros)

    # XLA drops this where the weights are constants, as they are in all of our passes.
    _, kernel_gradients = lax.scan(group, None, (_starts(sizes), sizes))
    return backwards, kernel_gradients, None


_product.defvjp(_product_forward, _product_backward)


def _starts(sizes: Int[Array, " e"]) -> Int[Array, " e"]:
    """The index of each group's first row; the type is given, or JAX might widen it to 64 bits."""
    return jnp.cumsum(sizes, dtype=sizes.dtype) - sizes


def _block_rows(rows: int, groups: int) -> int:
    """How many rows a block has: a power of two, about half of a mean group's rows."""
    return min(
        256, max(16, 1 << (rows // groups // 2).bit_length() - 1 if rows > 2 * groups else 0)
    )


Grid = Callable[[Int[Array, "n c"], Bool[Array, "n c"]], PyTree[Array]]
"""compute(rows, there) of `over_grid`."""


def over_grid(
    compute: Grid, routing: Routing, expert: Array, *, positions: int, axes: Sequence[str]
) -> PyTree[Array]:
    """Call `compute` on one expert's rows, arranged as a grid with a line for each document.

    The grid must be as wide as the largest number of rows that a document has for the expert. That
    is known at run time only, so there is one branch for each of a few widths, powers of two apart.

    Args:
        compute: Takes row numbers [document, column], and a mask of the same shape that is false
            where the grid has no row.
        routing: The routing of this device's documents.
        expert: The number of the expert.
        positions: S, which no document's number of rows exceeds.
        axes: The mesh axes; all devices take the same branch, because `compute` may communicate.

    Returns:
        What `compute` returns, for the narrowest of these grids that is wide enough; zeros for an
        expert that no token has chosen.
    """
    experts, documents = routing.counts.shape
    sizes = routing.counts.reshape(-1)
    first = _starts(sizes).reshape(experts, documents)[expert]
    count = routing.counts[expert]

    mean = len(routing.choice) // (experts * documents)
    widths = [positions]
    while widths[0] > max(8, mean):
        widths.insert(0, widths[0] // 2)

    def branch(width: int) -> PyTree[Array]:
        columns = jnp.arange(width, dtype=jnp.int32)[None]
        there = columns < count[:, None]
        return compute(jnp.where(there, first[:, None] + columns, 0), there)

    def nothing() -> PyTree[Array]:
        shapes = jax.eval_shape(partial(branch, widths[0]))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    most = count.max()
    for axis in axes:
        most = lax.pmax(most, axis)
    level = jnp.searchsorted(jnp.array([0, *widths], most.dtype), most)
    return lax.switch(level, [nothing, *(partial(branch, width) for width in widths)])
