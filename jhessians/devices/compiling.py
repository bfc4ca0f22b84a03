"""Compilation without the library calls of XLA that add up wrongly on a CPU.

jaxlib 0.10.2 hands sums of products to YNNPACK. Where one operand has no axis for the vectors that
`vmap` runs beside one another, as the model's own activations have none, all but the first vector's
sums come out wrong, in silence, once arrays have a few hundred thousand entries
(github.com/jax-ml/jax/issues/39103).
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY_CALLS = "xla_cpu_experimental_ynn_fusion_type"
"""XLA's option that lists what YNNPACK computes."""


def compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """`jax.jit` of a function that works on many vectors beside one another.

    Args:
        function: To be called from the host, not inside another `jit`, whose options would count.
        **options: Those of `jax.jit`.

    Returns:
        A function that is compiled when it is first called, without YNNPACK's sums.
    """

    @cache
    def jitted() -> Callable[P, R]:
        return jax.jit(function, compiler_options=compiler_options(), **options)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return jitted()(*args, **kwargs)

    return call


@cache
def compiler_options() -> dict[str, Any] | None:
    """What XLA is told; None where there is nothing to tell: not a CPU, or no such option."""
    if jax.default_backend() != "cpu":
        return None
    options = {LIBRARY_CALLS: ""}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(jnp.zeros(())).block_until_ready()
    except jax.errors.JaxRuntimeError:
        return None
    return options
