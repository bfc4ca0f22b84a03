"""Whether layers' activations are stored for the backward pass or computed a second time.

Of every layer in a stack the input is kept in any case (Chen et al. 2016, arXiv:1604.06174). To
store activations is to keep matrix products, too: every linear's output that the backward pass
reads, and attention's. It saves a forward pass through the stack. What lies between products is
cheap, and always computed again.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jhessians.capture.fold import Context
from jhessians.capture.linears import attach
from jhessians.capture.problem import Activations, Problem, keep_activations
from jhessians.capture.tape import Tape
from jhessians.data.batching import BatchPlan
from jhessians.folds.covariance import Covariance
from jhessians.typing import PyTree

AUTOMATIC = "auto"
"""The option's word for a choice by memory."""

SHARE = 0.5
"""Of the memory that model and statistics leave free, what stored activations may take; the rest is
for one layer's intermediates, the loss's logits and what is on its way to another device."""


def choose(stored: int, free: int) -> Activations:
    """`store` if that fits, else `recompute`.

    Args:
        stored: Bytes that a device would store for one batch.
        free: Bytes that model and statistics leave free on it.

    Returns:
        What `Problem.activations` should be.
    """
    return "store" if stored <= SHARE * free else "recompute"


def stored_bytes(problem: Problem, batch: PyTree[jax.ShapeDtypeStruct]) -> int:
    """How much more a device stores for one batch than where it recomputes activations.

    They are what a trace of the forward pass leaves to the backward pass, so that they are right
    for every architecture; nothing is computed.

    Args:
        problem: Loss, model (arrays or shapes) and the linears to record.
        batch: Shapes of one device's documents.

    Returns:
        Bytes.
    """
    return _residual_bytes(problem, batch, "store") - _residual_bytes(problem, batch, "recompute")


def _residual_bytes(
    problem: Problem, batch: PyTree[jax.ShapeDtypeStruct], activations: Activations
) -> int:
    graph, state = nnx.split(problem.model)

    def pullback(state, batch):
        def forward(statistics):
            copy = nnx.merge(graph, state, copy=True)
            keep_activations(copy, activations)
            # Its fold is asked in the backward pass only, which isn't traced.
            tape = Tape(Covariance(), problem.sites, statistics, {}, Context())
            attach(copy, tape)
            return problem.loss(copy, batch), tape.statistics

        return jax.vjp(forward, {name: jnp.zeros(()) for name in problem.sites})[1]

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

    Returns:
        In the structure of `example`, for `stored_bytes`.
    """
    rows, length = max(plan.shapes, key=math.prod)
    shape = rows // devices, length
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape[: x.ndim], x.dtype), example)
