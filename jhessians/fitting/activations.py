"""Whether layers' activations are stored for the backward pass or computed a second time.

Of every layer in a stack the input is kept in any case (Chen et al. 2016, arXiv:1604.06174). To
store activations is to keep matrix products, too: every linear's output that the backward pass
reads, and attention's. It saves a forward pass through the stack. What lies between products is
cheap, and always computed again.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.capture.tape import Tape, attach
from jhessians.capture.traversal import Loss
from jhessians.data.batching import BatchPlan
from jhessians.folds.covariance import Covariance
from jhessians.typing import PyTree

AUTOMATIC = "auto"
STORE = "store"
RECOMPUTE = "recompute"

SHARE = 0.5
"""Of the memory that model and statistics leave free, what stored activations may take; the rest is
for one layer's intermediates, the loss's logits and what is on its way to another device."""


def keep_activations(model: nnx.Module, choice: str) -> None:
    """Have every stack of `model` store or recompute, in place."""
    model.set_attributes(save_products=choice == STORE)


def choose(stored: int, free: int) -> str:
    """`store` if that fits, else `recompute`.

    Args:
        stored: Bytes that a device would store for one batch.
        free: Bytes that model and statistics leave free on it.
    """
    return STORE if stored <= SHARE * free else RECOMPUTE


def stored_bytes(
    loss: Loss, model: nnx.Module, batch: PyTree[jax.ShapeDtypeStruct], sites: Mapping[str, Site]
) -> int:
    """Bytes that a device stores for one batch and does not keep when it recomputes.

    They are what a trace of the forward pass leaves to the backward pass, so that they are right
    for every architecture; nothing is computed.

    Args:
        loss: Of the model and a batch.
        model: Arrays or shapes; left as it is.
        batch: Shapes of one device's documents.
        sites: The linears to record.
    """
    return _residual_bytes(loss, model, batch, sites, STORE) - _residual_bytes(
        loss, model, batch, sites, RECOMPUTE
    )


def _residual_bytes(loss, model, batch, sites, choice: str) -> int:
    graph, state = nnx.split(model)

    def pullback(state, batch):
        def forward(statistics):
            copy = nnx.merge(graph, state)
            keep_activations(copy, choice)
            # Its fold speaks in the backward pass only, which isn't traced.
            tape = Tape(Covariance(), sites, statistics, {}, Context())
            attach(copy, tape)
            return loss(copy, batch), tape.statistics

        return jax.vjp(forward, {name: jnp.zeros(()) for name in sites})[1]

    residuals = jax.tree.leaves(jax.eval_shape(pullback, state, batch))
    return sum(x.size * x.dtype.itemsize for x in residuals)


def largest_batch(
    plan: BatchPlan, example: PyTree[np.ndarray], devices: int
) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes of one device's documents in the batch that has most positions.

    Args:
        plan: All batches.
        example: One of them, of arrays [document] and [document, position].
        devices: Over which documents are spread.
    """
    rows, length = max(plan.shapes, key=math.prod)
    shape = rows // devices, length
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape[: x.ndim], x.dtype), example)
