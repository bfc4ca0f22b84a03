"""The problem that passes share: a loss, a model, the linears to record, and the devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from jhessians.capture.site import Site
from jhessians.devices.mesh import AnyMesh
from jhessians.devices.precision import HIGHEST
from jhessians.typing import Array, Float, Shaped

Loss = Callable[[Any, Any], Float[Array, "..."]]
"""loss(model, batch): a *sum* over documents, or a vector of such sums, one for each draw.

Folds see its gradients at the linears' outputs."""

Activations = Literal["store", "recompute"]
"""Whether the layers of a stack keep their matrix products for the backward pass."""


def position_mask(batch: Any) -> Shaped[Array | np.ndarray, "..."] | None:
    """The positions of a batch that count, [document, position]: its `position_mask`.

    Args:
        batch: A mapping with such a key or an object with such an attribute.

    Returns:
        The mask, as it is in the batch (numbers count where they aren't 0); None, which stands for
        all positions, where there is no such entry.

    Raises:
        ValueError: If there is no such entry, but another one whose name ends in "mask", such as
            `attention_mask`: which positions count must not be a guess. An entry `position_mask`
            that is None, or another `Problem.mask`, says that all of them do.
    """
    names = _entries(batch)
    if "position_mask" not in names and (other := [n for n in names if n.endswith("mask")]):
        raise ValueError(
            f"the batch has {other[0]} but no position_mask; expected position_mask, true where a "
            "position's gradient counts (as a rule all of a document but its last token): add it, "
            "or None for all positions"
        )
    mask: Array | np.ndarray | None = _entry(batch, "position_mask")
    return mask


def document_ids(batch: Any) -> np.ndarray | Array | None:
    """The numbers of a batch's documents in the data, [document]: its `document`.

    Args:
        batch: A mapping with such a key or an object with such an attribute.

    Returns:
        The numbers, -1 for rows that only fill up the batch; None where there is no such entry.
    """
    numbers: np.ndarray | Array | None = _entry(batch, "document")
    return numbers


def _entry(batch: Any, name: str) -> Any:
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


def _entries(batch: Any) -> list[str]:
    """The names of what a batch holds, where it has names."""
    if isinstance(batch, Mapping):
        return [name for name in batch if isinstance(name, str)]
    names: Any = getattr(batch, "_fields", None) or getattr(batch, "__dict__", ())
    return [str(name) for name in names]


@dataclass(frozen=True)
class Problem:
    """What every pass of one fit has in common.

    Attributes:
        loss: Summed over documents.
        model: The weights.
        sites: The linears to record, from `find_sites`.
        mask: Tells from a batch which positions count, [document, position], or None if all do;
            by default the batch's own `position_mask`.
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
    mesh: AnyMesh | None = None
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
    """Set in every stack of a model whether it stores its matrix products or recomputes them.

    Args:
        model: A copy made for one trace; it is changed in place.
        activations: What stacks do; None leaves each as it is.
    """
    if activations is not None:
        model.set_attributes(save_products=activations == "store", raise_if_not_found=False)
