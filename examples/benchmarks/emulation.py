"""Products of float32 matrices as matrix units make them, of parts with few bits."""

from collections.abc import Callable
from functools import partial
from itertools import product

import jax
from jax import lax
from jax._src.lax.lax import _dot_general_lower  # the rule that the emulation stands in for
from jax.interpreters import mlir

from jhessians.devices import precision
from jhessians.devices.precision import HIGHEST, MATMUL_PRECISIONS

EMULATED = [name for name in MATMUL_PRECISIONS if name != HIGHEST]

PARTS = {"bf16": (7, 1, 0), "bf16_x3": (7, 2, 1), "bf16_x6": (7, 3, 2), "tf32": (10, 1, 0),
         "tf32_x3": (10, 2, 1)}  # fmt: skip
"""Name → stored bits of a part's mantissa, number of parts, largest sum of two parts' places."""


def parts(x: jax.Array, bits: int, count: int) -> list[jax.Array]:
    """Numbers of few bits that add up to x, or nearly, the largest first."""
    found = []
    for _ in range(count):
        found.append(lax.reduce_precision(x, 8, bits))
        x = x - found[-1]
    return found


def emulated_product(
    x: jax.Array, y: jax.Array, name: str, multiply: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """x times y as a matrix unit makes it of short parts, the small products added first.

    Args:
        x, y: float32.
        name: Of `PARTS`.
        multiply: The product of two parts, in the type of the sum.
    """
    bits, count, last = PARTS[name]
    pairs = [pair for pair in product(range(count), repeat=2) if sum(pair) <= last]
    left, right = parts(x, bits, count), parts(y, bits, count)
    total = None
    for i, j in sorted(pairs, key=sum, reverse=True):
        term = multiply(left[i], right[j])
        total = term if total is None else total + term
    return total


def emulate_on_cpu() -> None:
    """From here on, the CPU multiplies in precisions that it otherwise only pretends to have."""
    names = {lax.DotAlgorithmPreset[MATMUL_PRECISIONS[name].jax]: name for name in EMULATED}

    def rule(ctx, x, y, *, precision, dimension_numbers, **settings):
        settings["dimension_numbers"] = dimension_numbers
        if precision not in names:
            return _dot_general_lower(ctx, x, y, precision=precision, platform="cpu", **settings)
        dtype = ctx.avals_out[0].dtype

        def multiply(x, y):
            return lax.dot_general(
                x, y, dimension_numbers, precision="highest", preferred_element_type=dtype
            )

        emulated = partial(emulated_product, name=names[precision], multiply=multiply)
        return mlir.lower_fun(emulated, multiple_results=False)(ctx, x, y)

    mlir.register_lowering(lax.dot_general_p, rule, platform="cpu")
    precision.require_supported = lambda name, device: None
