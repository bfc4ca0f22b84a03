"""Random projection matrices that are a function of a name, made where they are used.

Entry (row r, column c) comes from Philox4x32-10, a counter-based generator: one output is 128 bits
and a function of a counter and a key alone, so any part of a matrix can be made anywhere, at any
time, and the matrix A[:k, :l] is the [k, l] matrix of the same name.

    key      the first two little-endian words of md5(name), `projection_key`
    counter  (c // 128, r, 0, 0), bit c % 128 as ±1           rademacher
             (c // 4, r, 0, 0), number c % 4 by Box-Muller     normal

Names are "<module>/<left|right|single>", with "/seed<k>" where there is a seed. Rademacher
matrices are torch bergson's bit for bit; normal ones up to how a device rounds log, sin and cos.

u: [document, position, term, out] and v: [document, position, term, in]: a position's gradient is
the sum over terms of u vᵀ, one term where it is an outer product.

References:
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    Park et al. 2023, arXiv:2303.14186 (TRAK); Chang et al. 2024, arXiv:2410.17413, A.1.2.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jhessians.typing import Array, DTypeLike, Float, UInt32

Role = Literal["left", "right", "single"]

GLOBAL_BLOCK = 1 << 27  # entries of a named block of a global matrix: part of its definition
CHUNK_ENTRIES = 1 << 22  # entries of a global matrix that exist at a time: 16 MiB in float32
COLUMNS_PER_COUNTER = 128  # chunks begin at a multiple of it

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True)
class Projection:
    """The family of random matrices that gradients are projected with.

    Attributes:
        dimension: p. A matrix is [p, columns].
        distribution: Entries ±1, or standard normal.
        scale: `jl` divides by √p, which keeps lengths in expectation; `row_norm` makes every row
            a unit vector.
        seed: Every seed gives other matrices; None is bergson's default.
    """

    dimension: int
    distribution: Literal["rademacher", "normal"] = "rademacher"
    scale: Literal["jl", "row_norm"] = "jl"
    seed: int | None = None

    def name(self, module: str, role: Role) -> str:
        """The name of one of a module's matrices."""
        return f"{module}/{role}" + ("" if self.seed is None else f"/seed{self.seed}")

    def key(self, module: str, role: Role) -> UInt32[np.ndarray, "2"]:
        """The key of one of a module's matrices."""
        return projection_key(self.name(module, role))

    def global_keys(self, module: str, columns: int) -> UInt32[np.ndarray, "blocks 2"]:
        """The keys of all blocks of a module's part of the global matrix, [p, columns]."""
        name = self.name(module, "single")
        starts = range(0, columns, self.global_block)
        return np.stack([projection_key(f"{name}/{start}") for start in starts])

    @property
    def global_block(self) -> int:
        """Columns of a block of a global matrix; each block has a name of its own."""
        return max(1, GLOBAL_BLOCK // self.dimension)

    def matrices(
        self,
        keys: UInt32[Array | np.ndarray, "k 2"],
        columns: Sequence[int],
        dtype: DTypeLike = jnp.float32,
    ) -> list[Float[Array, "p _"]]:
        """Whole matrices [p, columns], scaled, one for each key.

        All are made at the largest width and then cut, so that the generator's few hundred
        operations are compiled once for all of them.

        Returns:
            In the order of the keys.
        """

        def make(key: UInt32[Array, "2"]) -> Float[Array, "p c"]:
            return random_entries(key, self.dimension, max(columns), self.distribution)

        entries = jax.vmap(make)(jnp.asarray(keys)).astype(dtype)
        return [self._scaled(entries[i, :, :width]) for i, width in enumerate(columns)]

    def _scaled(self, entries: Float[Array, "p c"]) -> Float[Array, "p c"]:
        if self.scale == "jl":
            return entries / math.sqrt(self.dimension)
        return entries / jnp.sqrt(jnp.square(entries).sum(1, keepdims=True))


def projection_key(name: str) -> UInt32[np.ndarray, "2"]:
    """Key of the matrix called `name`."""
    return np.frombuffer(hashlib.md5(name.encode()).digest()[:8], "<u4").astype(np.uint32)


def random_entries(
    key: UInt32[Array | np.ndarray, "2"],
    rows: int,
    columns: int,
    distribution: Literal["rademacher", "normal"],
    first_column: UInt32[Array, ""] | int = 0,
) -> Float[Array, "r c"]:
    """Columns `first_column` and following of the matrix of a key, unscaled, in float32.

    Args:
        key: From `projection_key`.
        rows: Number of rows, counted from row 0.
        columns: Number of columns.
        distribution: Distribution of the entries.
        first_column: A multiple of 128; may be traced.

    Returns:
        ±1 with equal probability, or standard normal numbers, [rows, columns].
    """
    per_counter = COLUMNS_PER_COUNTER if distribution == "rademacher" else 4
    counters = -(-columns // per_counter)
    first = jnp.asarray(first_column, jnp.uint32) // np.uint32(per_counter)
    counter = (first + jnp.arange(counters, dtype=jnp.uint32))[None]
    words = philox4x32(
        jnp.broadcast_to(counter, (rows, counters)),
        jnp.broadcast_to(jnp.arange(rows, dtype=jnp.uint32)[:, None], (rows, counters)),
        jnp.asarray(key, jnp.uint32),
    )
    entries = _signs(words) if distribution == "rademacher" else _normals(words)
    return entries.reshape(rows, counters * per_counter)[:, :columns]


def philox4x32(
    low: UInt32[Array, "*shape"], high: UInt32[Array, "*shape"], key: UInt32[Array, "2"]
) -> tuple[UInt32[Array, "*shape"], ...]:
    """The four words of Philox4x32-10 at the counter (low, high, 0, 0)."""
    x0, x1, x2, x3 = low, high, jnp.zeros_like(low), jnp.zeros_like(low)
    key0, key1 = key[0], key[1]
    for step in range(10):
        if step:
            key0, key1 = key0 + np.uint32(_WEYL[0]), key1 + np.uint32(_WEYL[1])
        (high0, low0), (high1, low1) = _product(_MULTIPLIERS[0], x0), _product(_MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
    return x0, x1, x2, x3


def _product(constant: int, x: UInt32[Array, "*shape"]) -> tuple[Array, Array]:
    """High and low word of a 64-bit product, by halves: JAX may have no 64-bit integers."""
    c_high, c_low = np.uint32(constant >> 16), np.uint32(constant & 0xFFFF)
    x_high, x_low = x >> 16, x & 0xFFFF
    low_high, high_low = c_low * x_high, c_high * x_low
    middle = (c_low * x_low >> 16) + (low_high & 0xFFFF) + (high_low & 0xFFFF)
    high = c_high * x_high + (low_high >> 16) + (high_low >> 16) + (middle >> 16)
    return high, np.uint32(constant) * x


def _signs(words: tuple[Array, ...]) -> Float[Array, "r w 128"]:
    """Bits, lowest first, as ±1."""
    stacked = jnp.stack(words, axis=-1)[..., None]
    bits = (stacked >> jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 1, 32)) & 1
    signs = bits.astype(jnp.float32) * 2 - 1
    return signs.reshape(*signs.shape[:2], COLUMNS_PER_COUNTER)


def _normals(words: tuple[Array, ...]) -> Float[Array, "r w 4"]:
    """Box-Muller in float32: two words give a radius and an angle, and these two numbers."""
    numbers = []
    for first, second in (words[:2], words[2:]):
        uniform = (first.astype(jnp.float32) + 0.5) * 2.0**-32
        radius = jnp.sqrt(-2 * jnp.log(uniform))
        angle = np.float32(2 * math.pi) * (second.astype(jnp.float32) * np.float32(2.0**-32))
        numbers += [radius * jnp.cos(angle), radius * jnp.sin(angle)]
    return jnp.stack(numbers, axis=-1)


def global_chunks(projection: Projection, columns: int) -> tuple[int, dict[str, np.ndarray]]:
    """Divide the columns of a global matrix into chunks, which are made one after the other.

    Returns:
        The width that all chunks have, and a table with a row per chunk: the number of its
        `block`, its `first` column within the block, its `start` among all columns, and how many
        of its columns are `valid` (the last chunk of a block may be narrower).
    """
    block = min(projection.global_block, columns)
    widest = max(1, CHUNK_ENTRIES // projection.dimension // COLUMNS_PER_COUNTER)
    width = min(widest, -(-block // COLUMNS_PER_COUNTER)) * COLUMNS_PER_COUNTER

    def chunks() -> Iterator[tuple[int, int, int, int]]:
        for number, start in enumerate(range(0, columns, projection.global_block)):
            end = min(start + projection.global_block, columns)
            for place in range(start, end, width):
                yield number, place - start, place, min(width, end - place)

    table = np.array(list(chunks()), np.int64)
    names = ("block", "first", "start", "valid")
    return width, {name: table[:, i].astype(np.int32) for i, name in enumerate(names)}


def project_global(
    projection: Projection,
    keys: UInt32[Array, "blocks 2"],
    u: Float[Array, "n s t o"],
    v: Float[Array, "n s t i"],
    *,
    factor: Float[Array, "o i"] | None = None,
    tokens: bool = False,
) -> Float[Array, "n *s p"]:
    """Flattened gradients times the transposed global matrix, of which only chunks ever exist.

    Args:
        projection: The family of the matrix.
        keys: The matrix's, from `Projection.global_keys` for O · I columns.
        u: Left vectors of the gradients' outer products.
        v: Right vectors.
        factor: Multiplies every entry of a gradient.
        tokens: Whether each position is a row; otherwise positions are summed.

    Returns:
        [document, p], or [document, position, p] with `tokens`.
    """
    n, s, terms, outputs = u.shape
    inputs = v.shape[-1]
    p = projection.dimension
    width, chunks = global_chunks(projection, outputs * inputs)
    # Rows of the gradient that a chunk may touch; it may begin and end in the middle of one.
    height = -(-(width + inputs - 1) // inputs)
    u = jnp.pad(u, ((0, 0),) * 3 + ((0, height),))  # so that no slice leaves the array
    factor = None if factor is None else jnp.pad(factor, ((0, height), (0, 0)))
    if not tokens:
        u, v = u.reshape(n, s * terms, -1), v.reshape(n, s * terms, inputs)

    def step(
        totals: tuple[Array, Array], chunk: dict[str, Array]
    ) -> tuple[tuple[Array, Array], None]:
        total, squares = totals
        entries = random_entries(
            keys[chunk["block"]],
            p,
            width,
            projection.distribution,
            chunk["first"].astype(jnp.uint32),
        ).astype(u.dtype)
        entries = jnp.where((jnp.arange(width, dtype=jnp.int32) < chunk["valid"])[None], entries, 0)
        squares += jnp.square(entries).sum(1)
        row = chunk["start"] // inputs
        grid = lax.dynamic_update_slice(
            jnp.zeros((p, height * inputs), u.dtype),
            entries,
            (np.int32(0), chunk["start"] % inputs),
        ).reshape(p, height, inputs)
        if factor is not None:
            grid *= lax.dynamic_slice_in_dim(factor, row, height, 0)[None]
        side = lax.dynamic_slice_in_dim(u, row, height, u.ndim - 1)
        if tokens:
            along = jnp.einsum("nsti,phi->nstph", v, grid)
            return (total + jnp.einsum("nstph,nsth->nsp", along, side), squares), None
        gradient = jnp.einsum("nsh,nsi->nhi", side, v)
        return (total + jnp.einsum("nhi,phi->np", gradient, grid), squares), None

    zeros = jnp.zeros((n, s, p) if tokens else (n, p), u.dtype)
    steps = jax.tree.map(jnp.asarray, chunks)
    (total, squares), _ = lax.scan(step, (zeros, jnp.zeros((p,), u.dtype)), steps)
    if projection.scale == "jl":
        return total / math.sqrt(p)
    return total / jnp.sqrt(squares).reshape((1,) * (total.ndim - 1) + (p,))
