"""Products of rows that are grouped by expert, and the grids in which folds see those rows.

A mixture of experts routes every token to a few of its experts. The tokens' copies, one for each
choice, are rows [row, feature], sorted by (expert, document, position), so that those of an expert,
and within them those of a document, follow one another.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.typing import Array, Bool, Float, Int, PyTree


class Routing(NamedTuple):
    """Which expert reads which tokens; t counts them over the batch, document · S + position.

    Attributes:
        choice: Of every row, the choice that it is of: t · k + number among the token's k.
        row: Of every choice, the row, [t, k].
        counts: How many rows there are, [expert, document].
    """

    choice: Int[Array, " r"]
    row: Int[Array, "t k"]
    counts: Int[Array, "e n"]

    @property
    def token(self) -> Int[Array, " r"]:
        """Of every row."""
        return self.choice // self.row.shape[1]

    @property
    def sizes(self) -> Int[Array, " e"]:
        """Every expert's rows."""
        return self.counts.sum(1, dtype=jnp.int32)


def route(choices: Int[Array, "n s k"], experts: int) -> Routing:
    """The routing of a batch whose tokens have chosen.

    Args:
        choices: The experts of each token, all different.
        experts: How many there are.
    """
    n, s, k = choices.shape
    flat = choices.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    chosen = jax.nn.one_hot(choices.reshape(n, s * k), experts, dtype=jnp.int32)
    return Routing(
        order.astype(jnp.int32),
        jnp.argsort(order).astype(jnp.int32).reshape(n * s, k),
        chosen.sum(1, dtype=jnp.int32).T,
    )


@jax.custom_vjp
def dispatch(tokens: Float[Array, "t d"], routing: Routing) -> Float[Array, "r d"]:
    """Every row's token. (Both ways it is a gather; JAX would make a scatter of one of them.)"""
    return tokens[routing.token]


dispatch.defvjp(
    lambda tokens, routing: (tokens[routing.token], routing),
    lambda routing, g: (g[routing.row].sum(1), None),
)


@jax.custom_vjp
def collect(rows: Float[Array, "r d"], routing: Routing) -> Float[Array, "t k d"]:
    """Every token's rows, in the order of its choices."""
    return rows[routing.row]


collect.defvjp(
    lambda rows, routing: (rows[routing.row], routing),
    lambda routing, g: (g.reshape(-1, g.shape[-1])[routing.choice], None),
)


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "r i"], kernels: Float[Array, "e i o"], sizes: Int[Array, " e"]
) -> Float[Array, "r o"]:
    """Each group's rows times the group's kernel.

    Blocks of rows, as many for each expert as it has. (`lax.ragged_dot` multiplies all rows with
    all kernels on CPU: 16 experts took 8 times as long.)

    Args:
        x: Rows, group after group.
        kernels: One for each group.
        sizes: Rows of each group.
    """
    rows, size = x.shape[0], _block_rows(x.shape[0], len(kernels))
    x = jnp.pad(x, ((0, size), (0, 0)))

    def group(y: Array, step: tuple[Array, Array, Array]) -> tuple[Array, None]:
        kernel, first, count = step

        def block(k: Array, y: Array) -> Array:
            # A last block that reaches into the next group's rows is overwritten by that group.
            start = first + k * size
            product = lax.dynamic_slice_in_dim(x, start, size) @ kernel
            return lax.dynamic_update_slice_in_dim(y, product, start, 0)

        return lax.fori_loop(0, -(-count // size), block, y), None

    y = jnp.zeros((rows + size, kernels.shape[-1]), x.dtype)
    return lax.scan(group, y, (kernels, _starts(sizes), sizes))[0][:rows]


def _product_forward(x, kernels, sizes):
    return grouped_product(x, kernels, sizes), (x, kernels, sizes)


def _product_backward(residuals, g):
    x, kernels, sizes = residuals
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

    # Never computed where the weights are constants, as in all of our passes.
    _, kernel_gradients = lax.scan(group, None, (_starts(sizes), sizes))
    return grouped_product(g, kernels.swapaxes(-1, -2), sizes), kernel_gradients, None


grouped_product.defvjp(_product_forward, _product_backward)


def _starts(sizes: Int[Array, " e"]) -> Int[Array, " e"]:
    """Where each group's rows begin. (JAX would widen sums where it has 64 bits.)"""
    return jnp.cumsum(sizes, dtype=sizes.dtype) - sizes


def _block_rows(rows: int, groups: int) -> int:
    """Rows of a block: about half of a group's, a power of two."""
    return min(
        256, max(16, 1 << (rows // groups // 2).bit_length() - 1 if rows > 2 * groups else 0)
    )


Grid = Callable[[Int[Array, "n c"], Bool[Array, "n c"]], PyTree[Array]]


def over_grid(
    compute: Grid, routing: Routing, expert: Array, *, positions: int, axes: Sequence[str]
) -> PyTree[Array]:
    """`compute` of the grid in which each document has its rows for one expert.

    The grid is as wide as the document with most rows needs, in powers of two: a branch for each,
    chosen at run time, and zeros for an expert that nobody has chosen.

    Args:
        compute: Of row numbers [document, column] and of which of them stand for a row.
        routing: Of this device's documents.
        expert: Which one.
        positions: S, the width that is always enough.
        axes: Mesh axes: all devices take the same branch, since `compute` may communicate.
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
