"""Layer norm and RMS norm over the last axis, as a `NormConfig` says."""

import jax.numpy as jnp
from flax import nnx
from jax import lax

from jhessians.models.config import NormConfig
from jhessians.models.layers import at_least_float32
from jhessians.typing import Array, DTypeLike, Float


class Norm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon) * (offset + scale) + bias, at least in float32.

    Args:
        features: Size of the last axis. A tuple gives sizes of the last axes; the norm is over the
            last one alone, and each entry of the others has a scale of its own.
        config: Which parts of the formula there are.
        dtype: Number format of the parameters.
    """

    def __init__(
        self, features: int | tuple[int, ...], config: NormConfig, *, dtype: DTypeLike = jnp.float32
    ):
        shape = features if isinstance(features, tuple) else (features,)
        initial = jnp.full(shape, 1 - config.offset, dtype)
        self.scale = nnx.Param(initial) if config.scale else None
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if config.bias else None
        self.config = config

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Each row, normed over its features in float32 or wider."""
        c = self.config
        wide = x.astype(at_least_float32(x.dtype))
        if c.variant == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        normed = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + c.epsilon)
        if not c.wide_scale:
            normed = normed.astype(x.dtype)
        if self.scale is not None:
            normed = normed * (_like(self.scale[...], normed) + c.offset)
        if self.bias is not None:
            normed = normed + _like(self.bias[...], normed)
        return normed.astype(x.dtype)


def norm_if(wanted: bool, features: int, config: NormConfig, dtype: DTypeLike) -> Norm | None:
    """A norm, or None where the architecture has none."""
    return Norm(features, config, dtype=dtype) if wanted else None


def apply(norm: Norm | None, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """`norm(x)`, or `x` where there is none."""
    return x if norm is None else norm(x)


def _like(parameter: Array, x: Array) -> Array:
    """A parameter with as many axes as `x` and its number format, to be combined with it."""
    missing = (1,) * (x.ndim - parameter.ndim)
    return parameter.reshape(missing + parameter.shape).astype(x.dtype)
