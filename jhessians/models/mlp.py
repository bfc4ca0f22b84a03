"""The MLP of a block: two linears, or three if it is gated, of which two may be fused into one."""

import jax.numpy as jnp
from flax import nnx

from jhessians.models.config import MLPConfig
from jhessians.models.layers import ACTIVATIONS, Linear
from jhessians.typing import Array, DTypeLike, Float


class MLP(nnx.Module):
    """down(activation(up(x))), or gated by activation(gate(x)).

    Args:
        hidden: Features of input and output.
        config: Which linears there are, and the nonlinearity.
        dtype: Number format of the parameters.
        rngs: Draws the parameters.
    """

    def __init__(self, hidden: int, config: MLPConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=c.bias, dtype=dtype, rngs=rngs)

        separate = c.variant in ("plain", "gated")
        self.gate = linear(hidden, c.size) if c.variant == "gated" else None
        self.up = linear(hidden, c.size) if separate else None
        self.gate_up = None if separate else linear(hidden, 2 * c.size)
        self.down = linear(c.size, hidden)
        self.config = c

    def __call__(self, h: Float[Array, "n s d"]) -> Float[Array, "n s d"]:
        """What the MLP adds to the residual stream."""
        if self.gate_up is not None:
            return self.down(gated(self.config, self.gate_up(h)))
        assert self.up is not None
        activate = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            return self.down(activate(self.up(h)))
        return self.down(activate(self.gate(h)) * self.up(h))


def gated(config: MLPConfig, gate_up: Float[Array, "*rows f"]) -> Float[Array, "*rows h"]:
    """activation(gate) · (up + offset) from a fused linear's output, which holds both: f = 2 h."""
    c = config
    if c.variant == "interleaved":
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        gate, up = jnp.split(gate_up, 2, axis=-1)
    if c.limit is not None:
        gate, up = jnp.minimum(gate, c.limit), jnp.clip(up, -c.limit, c.limit)
    up = up + c.up_offset if c.up_offset else up
    return ACTIVATIONS[c.activation](gate) * up
