"""The MLP of a block: two linears, three, or two of which one is two side by side."""

import jax.numpy as jnp
from flax import nnx

from jhessians.models.config import DecoderConfig
from jhessians.models.layers import ACTIVATIONS, Linear
from jhessians.typing import Array, DTypeLike, Float


class MLP(nnx.Module):
    """down(activation(up(x))), or gated by activation(gate(x))."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, hidden = config.mlp, config.hidden_size

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=c.bias, dtype=dtype, rngs=rngs)

        self.gate = linear(hidden, c.size) if c.kind == "gated" else None
        self.up = linear(hidden, c.size) if c.kind != "fused" else None
        self.gate_up = linear(hidden, 2 * c.size) if c.kind == "fused" else None
        self.down = linear(c.size, hidden)
        self.activation = c.activation

    def __call__(self, h: Float[Array, "n s d"]) -> Float[Array, "n s d"]:
        activate = ACTIVATIONS[self.activation]
        if self.gate_up is not None:
            gate, up = jnp.split(self.gate_up(h), 2, axis=-1)
            return self.down(activate(gate) * up)
        assert self.up is not None
        if self.gate is None:
            return self.down(activate(self.up(h)))
        return self.down(activate(self.gate(h)) * self.up(h))
