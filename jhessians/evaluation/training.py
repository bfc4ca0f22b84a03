"""Training a small model from its beginning, as a function of the documents' weights.

weights: [document], 1 for a document that is trained on and 0 for one that is left out. All models
of a recipe begin with the same parameters and see the same documents in the same order; a document
of weight 0 adds nothing to its batch, whose loss is divided by the same number as ever. So the
trained parameters are a smooth function of the weights, which attribution is about. (Ilyas &
Engstrom 2025, arXiv:2504.16430, train in the same way.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jhessians.data.batching import Batch, BatchPlan, iterate_batches, plan_batches
from jhessians.data.documents import Documents
from jhessians.models.decoder import Decoder
from jhessians.typing import Array, Float

SHAPES = 4
"""Shapes of batches, each of which is compiled."""

EPS_ROOT = 1e-8
"""Added under AdamW's root, so that a step has a derivative where a gradient is zero."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, warm-up and a cosine down to zero, gradients clipped.

    Attributes:
        epochs: How often every document is seen.
        learning_rate: The highest.
        weight_decay: Decoupled, of all parameters.
        token_batch_size: Positions of a batch, padding included.
        seed: Of the initial parameters and of the order.
    """

    epochs: int = 10
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    token_batch_size: int = 2048
    seed: int = 0

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a training of so many steps."""
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, steps // 20, steps)
        adam = optax.adamw(rate, b2=0.98, eps_root=EPS_ROOT, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(1.0), adam)


class State(NamedTuple):
    """A model in training.

    Attributes:
        parameters: Of the decoder.
        moments: The optimizer's.
    """

    parameters: nnx.State
    moments: Any


def document_losses(model: Decoder, batch: Batch) -> Float[Array, " n"]:
    """Each document's loss, twice differentiable, unlike the loss that curvature is made of.

    Args:
        model: Whose logits, which exist whole.
        batch: The documents.

    Returns:
        In nats, summed over a document's labelled next tokens.
    """
    lengths = jnp.asarray(batch.position_mask).sum(1, dtype=jnp.int32) + 1
    logits = model.logits(model.hidden(jnp.asarray(batch.tokens), lengths))[:, :-1]
    labels = jnp.asarray(batch.labels)[:, 1:]
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    losses = jax.nn.logsumexp(logits, -1) - chosen
    return jnp.where(labels >= 0, losses, 0).sum(1)


def shuffled(plan: BatchPlan, rng: np.random.Generator) -> BatchPlan:
    """The same shapes in another order, with other documents of the right length in them."""
    batches = []
    for shape in sorted(plan.shapes):
        alike = [batch.documents for batch in plan.batches if batch.shape == shape]
        documents = rng.permutation(np.concatenate(alike))
        bounds = np.cumsum([len(members) for members in alike])[:-1]
        parts = np.split(documents, bounds)
        batches += [plan.batches[0]._replace(documents=part, shape=shape) for part in parts]
    return replace(plan, batches=tuple(batches[i] for i in rng.permutation(len(batches))))


class Training:
    """A recipe with a model and documents.

    Args:
        model: At its beginning; stays as it is.
        documents: All that may be trained on.
        recipe: How.

    Attributes:
        steps: How many there are.
    """

    def __init__(self, model: Decoder, documents: Documents, recipe: Recipe):
        self._graph, self._parameters = nnx.split(model)
        self._documents, self._recipe = documents, recipe
        self._plan = plan_batches(
            documents.lengths, token_batch_size=recipe.token_batch_size, max_shapes=SHAPES
        )
        self.steps = recipe.epochs * len(self._plan)
        self._optimizer = recipe.optimizer(self.steps)

    def start(self) -> State:
        """Before the first step."""
        return State(self._parameters, self._optimizer.init(self._parameters))

    def batches(self) -> Iterator[Batch]:
        """Those of every step, always the same."""
        rng = np.random.default_rng(self._recipe.seed)
        for _ in range(self._recipe.epochs):
            yield from iterate_batches(self._documents, shuffled(self._plan, rng))

    def step(self, state: State, batch: Batch, weights: Float[Array, " document"]) -> State:
        """The state after another batch; pure."""

        def loss(parameters: nnx.State) -> Array:
            losses = document_losses(nnx.merge(self._graph, parameters), batch)
            of_rows = jnp.where(batch.document >= 0, weights[batch.document], 0)
            targets = (batch.labels[:, 1:] >= 0).sum().astype(losses.dtype)
            return (of_rows.astype(losses.dtype) * losses).sum() / targets

        gradient = jax.grad(loss)(state.parameters)
        with jax.numpy_dtype_promotion("standard"):  # optax has floats to the power of integers
            updates, moments = self._optimizer.update(gradient, state.moments, state.parameters)
        return State(optax.apply_updates(state.parameters, updates), moments)

    def model(self, parameters: nnx.State | None = None) -> Decoder:
        """The decoder with these parameters; with those of its beginning without any."""
        return nnx.merge(self._graph, self._parameters if parameters is None else parameters)
