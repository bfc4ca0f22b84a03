"""The problem that passes share: a loss, a model, the linears to record, and the devices."""

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
"""loss(model, batch): a *sum* over documents, or a vector of such sums, one for each draw.

Folds see its gradients at the linears' outputs."""

Activations = Literal["store", "recompute"]
"""Whether the layers of a stack keep their matrix products for the backward pass."""


def position_mask(batch: Any) -> Bool[Array | np.ndarray, "n s"] | None:
    """The positions of a batch that count, [document, position]: its `position_mask`.

    Args:
        batch: An object with an attribute of that name, or a mapping with such a key.

    Returns:
        The mask, or None for any other batch, all of whose positions count.
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
        mask: Returns the positions of a batch that count, or None if all do.
        mesh: Devices, over which documents and rows of statistics are spread; None for the one
            device that the batches are on.
        draws: How many losses `loss` returns, over which statistics are averaged.
        matmul_precision: How float32 numbers are multiplied (`jhessians.devices.precision`).
        activations: Whether stacks keep their matrix products for the backward pass or compute
            them again; None leaves each stack as it is.
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
        """The same problem with another model, such as one merged inside a caller's own `jit`."""
        return replace(self, model=model)


def keep_activations(model: nnx.Module, activations: Activations | None) -> None:
    """Set in every stack of `model`, a copy made for one trace, what it does with its products."""
    if activations is not None:
        model.set_attributes(save_products=activations == "store", raise_if_not_found=False)
