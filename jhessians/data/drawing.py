"""Other documents at each step, in batches of a few shapes, so that no step compiles anew.

Every epoch goes through the data in an order of its own; which documents a step gets depends on
the seed and the step's number alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int

from jhessians.data.batches import Batches
from jhessians.data.batching import LENGTH_MULTIPLE, BatchPlan, PlannedBatch
from jhessians.data.documents import Documents
from jhessians.data.selecting import select
from jhessians.errors import DatasetError

SHAPES = 4
"""Lengths of batches, each half as long as the one before."""


def permutation(count: int, *seed: int) -> Int[np.ndarray, " number"]:
    """The numbers below `count` in an order that the seed alone decides."""
    return np.random.default_rng(seed if len(seed) > 1 else seed[0]).permutation(count)


@dataclass(frozen=True)
class Draws:
    """Documents of steps, none of which comes twice in an epoch.

    What is left at an epoch's end, less than a step takes, waits for the next epoch.

    Attributes:
        documents: The data.
        numbers: Which documents may be drawn.
        count: How many a step takes.
        seed: Of the epochs' orders.
        token_batch_size: Tokens that a device takes at once.
        devices: Rows of a batch are a multiple of it.
        max_length: How many positions the model has.

    Raises:
        DatasetError: If a step takes more documents than there are, or one is longer than a batch.
    """

    documents: Documents
    numbers: Int[np.ndarray, " number"]
    count: int
    seed: int
    token_batch_size: int
    devices: int = 1
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.count <= len(self.numbers):
            raise DatasetError(
                f"a step takes {self.count} documents, of {len(self.numbers)} that may be drawn; "
                "expected 1 or more, and no more than there are"
            )
        if self._longest > self.token_batch_size:
            raise DatasetError(
                f"a document has {self._longest} tokens, but a batch {self.token_batch_size}; "
                "take larger batches"
            )

    def of_step(self, step: int) -> Int[np.ndarray, " number"]:
        """The documents' numbers, ascending."""
        epoch, place = divmod(step, len(self.numbers) // self.count)
        order = permutation(len(self.numbers), self.seed, epoch)
        return np.sort(self.numbers[order[place * self.count : (place + 1) * self.count]])

    def batches(self, step: int) -> Batches:
        """The documents in batches; those under two tokens are in none."""
        chosen = select(self.documents, self.of_step(step))
        return Batches(chosen, self._plan(chosen.lengths))

    @property
    def _longest(self) -> int:
        return int(self.documents.lengths[self.numbers].max())

    @cached_property
    def _shapes(self) -> dict[int, int]:
        """Length → rows of a batch, short ones first."""
        most = self._longest + -self._longest % LENGTH_MULTIPLE
        most = max(self._longest, min(most, self.max_length or most))
        lengths = {max(most >> k, min(most, LENGTH_MULTIPLE)) for k in range(SHAPES)}
        rows = -(-self.count // self.devices)
        return {
            length: self.devices * max(1, min(rows, self.token_batch_size // length))
            for length in sorted(lengths)
        }

    def _plan(self, lengths: Int[np.ndarray, " document"]) -> BatchPlan:
        """The longest documents share a batch as short as the first of them allows, and so on."""
        order = np.argsort(-lengths, kind="stable").astype(np.int32)
        order = order[lengths[order] > 1]
        length, rows = next(iter(self._shapes.items()))
        empty = PlannedBatch(order[:0], (rows, length))
        planned = list(self._filled(order, lengths)) or [empty]
        computed = sum(rows * length for _, (rows, length) in planned)
        return BatchPlan(
            tuple(planned), frozenset(each.shape for each in planned),
            1 - float(lengths[order].sum()) / max(computed, 1), len(lengths) - len(order),
        )  # fmt: skip

    def _filled(
        self, order: Int[np.ndarray, " real"], lengths: Int[np.ndarray, " document"]
    ) -> Iterator[PlannedBatch]:
        start = 0
        while start < len(order):
            longest = lengths[order[start]]
            length, rows = next((le, n) for le, n in self._shapes.items() if le >= longest)
            yield PlannedBatch(order[start : start + rows], (rows, length))
            start += rows
