"""Linear layers that a fold can listen to, activations, and the scanned stack.

x: [document, position, in]. A kernel is stored [in, out], as in Flax.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jhessians.capture.linears import Tapped, attach
from jhessians.devices.offloading import to_device
from jhessians.typing import Array, DTypeLike, Float, PyTree

PRODUCT = "matrix product"
"""The `checkpoint_name` of products that a checkpoint policy would not recognise as such."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float64 for float64, float32 for every other format: where sums and softmaxes are made."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def per_feature(vector: Float[Array, " d"], x: Float[Array, "*rows d"]) -> Float[Array, "*one d"]:
    """A vector of features with axes of size one in front, so that it can be combined with `x`."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class Linear(Tapped):
    """y = x W + b, the layer whose inputs and output gradients every fold sees.

    Its attribute `adapter` may be set to a module (`jhessians.models.lora`) whose output is added.

    Args:
        in_features: I.
        out_features: O.
        use_bias: Whether there is a b.
        name: Name of its statistics, by default its path in the model; inside a `Stack`,
            `{layer}` stands for the layer's number.
        dtype: Number format of the parameters.
        rngs: Draws the kernel, normal with standard deviation 1 / sqrt(I).
    """

    adapter: Any = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        name: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        scale = in_features**-0.5
        self.kernel = nnx.Param(
            scale * jax.random.normal(rngs.params(), (in_features, out_features), dtype)
        )
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None
        self.in_features = in_features
        self.out_features = out_features
        self.name = name

    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
        """The product with the kernel, the bias, and what the adapter adds."""
        kernel = self.kernel[...]
        y = x @ kernel if self.tape is None else self.tape.record(self, x, kernel)
        y = y if self.bias is None else y + per_feature(self.bias[...], y)
        return y if self.adapter is None else y + self.adapter(x)


class Stack(Tapped):
    """`count` blocks of one shape with stacked parameters, run by one `lax.scan`.

    A scan compiles one block instead of all of them (measured: 1 s instead of 10 s for 32), and
    `jax.checkpoint` around its body bounds the memory to one block's intermediates.

    Args:
        create: Builds one block from its own random streams.
        count: L, the number of blocks.
        rngs: The random streams, which are split among the blocks.
        save_products: Whether the blocks' matrix products are stored for the backward pass, which
            is faster, or computed again, which takes less memory.
    """

    scans = True
    offloaded = False
    """Whether its matrices lie in host memory, from where one block at a time is fetched."""

    def __init__(
        self,
        create: Callable[[nnx.Rngs], nnx.Module],
        count: int,
        *,
        rngs: nnx.Rngs,
        save_products: bool = True,
    ):
        self.blocks = nnx.vmap(create)(rngs.split(count))
        self.count = count
        self.save_products = save_products

    def __call__(
        self,
        h: Float[Array, "*rows d"],
        *shared: PyTree[Array],
        each_layer: tuple[Array, ...] = (),
    ) -> Float[Array, "*rows d"]:
        """Run the blocks in order.

        Args:
            h: Input of the first block.
            shared: Further arguments of every block.
            each_layer: Arrays with a leading layer axis; block l gets their l-th entries as its
                last arguments.

        Returns:
            Output of the last block.
        """
        graph, state = nnx.split(self.blocks)
        tape = self.tape
        statistics = tape.statistics if tape else {}

        def body(carry, step):
            hidden, statistics = carry
            state, own, layer = step
            state = to_device(state) if self.offloaded else state
            block = nnx.merge(graph, state)
            if tape is not None:
                inner = tape.inside(statistics, layer, self.count)
                attach(block, inner, prefix=f"{self.name}.{{layer}}")
                tape.gather_weights(block)
            hidden = block(hidden, *shared, *own)
            return (hidden, inner.close() if tape else statistics), None

        # A policy of matrix products does not save gathered weights, which would undo `fsdp`.
        policies = jax.checkpoint_policies
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCT)
        )
        policy = policy if self.save_products else None
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        steps = (state, each_layer, jnp.arange(self.count))
        # A weakly typed carry would have the body traced twice, and its calls counted twice.
        h = lax.convert_element_type(h, h.dtype)
        (h, statistics), _ = lax.scan(body, (h, statistics), steps)
        if tape is not None:
            tape.statistics = statistics
        return h
