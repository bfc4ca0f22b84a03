"""Many models of one recipe, each without some of the documents, and what they lose on queries.

weights: [model, document]. Devices share the models between them; a device trains some side by
side (`jax.vmap`), or one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool

from jhessians.data.batches import Batches
from jhessians.data.batching import Batch
from jhessians.devices.compiling import compiled
from jhessians.evaluation.training import State, Training, document_losses
from jhessians.typing import Array, Float, PyTree

SIDE_BY_SIDE = 16
"""Models that an accelerator trains at once, unless told otherwise."""


def models_at_once(mesh: Mesh) -> int:
    """How many models a device trains side by side.

    Args:
        mesh: The devices.

    Returns:
        1 on CPUs, where the products of several models take longer than one after the other.
    """
    return 1 if mesh.devices.flat[0].platform == "cpu" else SIDE_BY_SIDE


class Trained(NamedTuple):
    """Some models that were trained.

    Attributes:
        losses: Of each query, summed over its labelled tokens, in nats.
        parameters: Of the models, the first axis theirs; on the devices.
    """

    losses: Float[np.ndarray, "model query"]
    parameters: PyTree[Array]


class Retraining:
    """Trains models of one recipe on other documents.

    Args:
        training: The recipe, the model's beginning and the documents.
        queries: What the models are asked.
        mesh: The devices that share the models.
        at_once: Models that a device trains side by side.
    """

    def __init__(self, training: Training, queries: Batches, mesh: Mesh, at_once: int):
        self._training, self._queries, self._mesh = training, queries, mesh
        self._block = mesh.size * at_once
        names, together = P(mesh.axis_names), at_once > 1

        def spread(function, arguments):  # type: ignore[no-untyped-def]
            """A model's function as that of many, `None` marking what all of them share."""

            def of_device(*values):  # type: ignore[no-untyped-def]
                axes = tuple(0 if each else None for each in arguments)
                if together:
                    return jax.vmap(function, axes)(*values)
                alone = (
                    jax.tree.map(lambda x: x[0], value) if each else value
                    for each, value in zip(arguments, values, strict=True)
                )  # fmt: skip
                return jax.tree.map(lambda x: x[None], function(*alone))

            places = tuple(names if each else P() for each in arguments)
            return jax.shard_map(
                of_device, mesh=mesh, in_specs=places, out_specs=names, check_vma=False
            )

        def losses(state: State, batch: Batch) -> Array:
            return document_losses(training.model(state.parameters), batch)

        self._step = compiled(spread(training.step, (True, False, True)), donate_argnums=0)
        self._losses = compiled(spread(losses, (True, False)))

    def run(
        self, weights: Float[np.ndarray, "model document"] | Bool[np.ndarray, "model document"]
    ) -> Iterator[Trained]:
        """Train one model for each row.

        Args:
            weights: Of the documents.

        Yields:
            A few models at a time, in order.
        """
        for start in range(0, len(weights), self._block):
            rows = weights[start : start + self._block]
            missing = self._block - len(rows)
            filled = np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)])
            state = self._train(filled.astype(np.float32))
            losses = self._ask(state)[: len(rows)]
            yield Trained(losses, state.parameters)

    def _train(self, weights: np.ndarray) -> State:
        place = NamedSharding(self._mesh, P(self._mesh.axis_names))

        def copies(leaf: Array) -> Array:
            return jax.device_put(np.repeat(np.asarray(leaf)[None], len(weights), axis=0), place)

        state = jax.tree.map(copies, self._training.start())
        of_models = jax.device_put(weights, place)
        for batch in self._training.batches():
            state = self._step(state, batch, of_models)
        return state

    def _ask(self, state: State) -> np.ndarray:
        found = np.zeros((self._block, len(self._queries.documents)), np.float32)
        for batch in self._queries:
            real = batch.document >= 0
            found[:, batch.document[real]] = np.asarray(self._losses(state, batch))[:, real]
        return found


def random_subsets(models: int, documents: int, share: float, seed: int) -> np.ndarray:
    """Which documents each model is trained on, all sets of the same size.

    Args:
        models: How many sets.
        documents: How many there are to choose from.
        share: Of them in a set, between 0 and 1.
        seed: Of the draw; set m depends on it and m alone.

    Returns:
        [model, document] of bool.
    """
    size = min(max(1, round(share * documents)), documents)
    subsets = np.zeros((models, documents), bool)
    for model in range(models):
        rng = np.random.default_rng([seed, model])
        subsets[model, rng.permutation(documents)[:size]] = True
    return subsets
