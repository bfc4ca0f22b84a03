"""What is differentiated: a loss of a model, the linears that are recorded, and the devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jhessians.capture.site import Site
from jhessians.devices.precision import HIGHEST
from jhessians.typing import Array, Bool, Float

Loss = Callable[[Any, Any], Float[Array, "..."]]
"""loss(model, batch), a *sum* over documents, whose gradient at every linear is what folds see."""

Activations = Literal["store", "recompute"]
"""Whether the layers of a stack keep their matrix products for the backward pass."""


def position_mask(batch: Any) -> Bool[Array | np.ndarray, "n s"] | None:
    """The positions of a batch that count, [document, position]: its `position_mask`.

    Args:
        batch: An object with an attribute of that name, or a mapping with such a key; any other
            batch counts as a whole.
    """
    if isinstance(batch, Mapping):
        return batch.get("position_mask")
    return getattr(batch, "position_mask", None)


@dataclass(frozen=True)
class Problem:
    """What every pass of one fit has in common.

    Attributes:
        loss: Summed over documents.
        model: The weights.
        sites: The linears to record, from `find_sites`.
        mask: Tells from a batch which positions count; None if all do.
        mesh: Devices, over which documents and rows of statistics are spread; None for the one
            device that the batches are on.
        draws: How many losses `loss` returns, over which statistics are averaged.
        matmul_precision: How float32 numbers are multiplied (`jhessians.devices.precision`).
        activations: What stacks of layers do about the backward pass; None leaves each as it is.
    """

    loss: Loss
    model: nnx.Module
    sites: Mapping[str, Site]
    mask: Callable[[Any], Array | np.ndarray | None] = position_mask
    mesh: Mesh | None = None
    draws: int = 1
    matmul_precision: str = HIGHEST
    activations: Activations | None = None

    @property
    def hosts(self) -> int:
        """How many processes share the documents."""
        return jax.process_count() if self.mesh else 1

    def of(self, model: nnx.Module) -> "Problem":
        """The same problem of other weights, such as those that a caller's own `jit` is given."""
        return replace(self, model=model)


def keep_activations(model: nnx.Module, activations: Activations | None) -> None:
    """Have every stack of `model`, a copy that was merged for one trace, store or recompute."""
    if activations is not None:
        model.set_attributes(save_products=activations == "store", raise_if_not_found=False)
