"""A tape that records nothing: the forward pass of a model whose weights are spread over a mesh."""

from typing import Any

from flax import nnx

from jhessians.capture.linears import Tapped, Weight
from jhessians.capture.products import Product
from jhessians.capture.routing import Routing
from jhessians.capture.shards import gather_weights
from jhessians.capture.taps import product
from jhessians.typing import Array


class QuietTape:
    """What a model's modules ask to multiply where derivatives are JAX's own.

    Args:
        axes: The mesh axes that parameters are sharded over; none without a mesh.
        backward_only: Whether derivatives are taken backwards alone, which is faster; otherwise
            forwards alone.

    Attributes:
        statistics: None, as a scan over layers carries them.
    """

    def __init__(self, axes: tuple[str, ...], *, backward_only: bool):
        self.axes, self.backward_only = axes, backward_only
        self.statistics: dict[str, Any] = {}

    def inside(self, statistics: dict[str, Any], layer: Array, count: int) -> "QuietTape":
        """The tape of one of a stack's layers: this one."""
        return self

    def gather_weights(self, module: nnx.Module) -> None:
        """Make whole, in place, the parameters of `module` that are sharded over the mesh."""
        gather_weights(module, self.axes, keep_tables=False)

    def record(
        self, linear: Tapped, x: Array, kernel: Array, routing: Routing | None = None
    ) -> Array:
        """Multiply for a linear; arguments and result as of `Tape.record`."""
        return product(x, kernel, routing)

    def observe(self, weight: Weight, how: Product, x: Array, kernel: Array, y: Array) -> Array:
        """See the product of a linear of Flax: y, as it is."""
        return y

    def close(self) -> dict[str, Any]:
        """End the pass, or a stack's layer: no statistics."""
        return {}
