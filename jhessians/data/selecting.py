"""Some documents of a data set as a data set of their own, whole or a position at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jhessians.data.batching import Batch, BatchPlan, iterate_batches, plan_batches
from jhessians.data.documents import Documents


def select(documents: Documents, numbers: Int[np.ndarray, " document"]) -> Documents:
    """The documents of these numbers, in this order; a number may come several times.

    Args:
        documents: All of them.
        numbers: Which ones.

    Returns:
        A copy of their tokens and labels.
    """
    numbers = np.asarray(numbers, np.int64)
    starts, lengths = documents.offsets[numbers], documents.lengths[numbers]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    labels = None if documents.labels is None else documents.labels[places]
    return Documents(documents.tokens[places], labels, offsets)


class Column(NamedTuple):
    """What one column of scores is about: a document, or one position of it."""

    document: int
    position: int | None = None


def columns_of(documents: Documents, *, tokens: bool) -> list[Column]:
    """A column for every document or, with `tokens`, for every position that carries a gradient."""
    if not tokens:
        return [Column(number) for number in range(len(documents))]
    return [
        Column(number, position)
        for number, length in enumerate(documents.lengths)
        for position in range(max(int(length) - 1, 0))
    ]


@dataclass(frozen=True)
class ColumnBatches:
    """Batches whose rows are columns; their `document` is the column's number among these.

    A row that stands for one position is its whole document, of which only that position counts.

    Attributes:
        documents: All documents.
        columns: Which ones, or which positions of them.
        token_batch_size: Tokens that a device takes at once; at least one document's.
        devices: Rows of a batch are a multiple of it.
        max_length: How many positions the model has.
    """

    documents: Documents
    columns: tuple[Column, ...]
    token_batch_size: int
    devices: int = 1
    max_length: int | None = None

    @property
    def plan(self) -> BatchPlan:
        """How the columns are divided into batches."""
        lengths = self.documents.lengths[[column.document for column in self.columns]]
        size = max(self.token_batch_size, int(lengths.max()))
        return plan_batches(
            lengths, token_batch_size=size, devices=self.devices, max_length=self.max_length
        )

    def __iter__(self) -> Iterator[Batch]:
        numbers = np.array([column.document for column in self.columns])
        whole = -1
        positions = np.array(
            [whole if c.position is None else c.position for c in self.columns]
        )  # fmt: skip
        batches = iterate_batches(
            select(self.documents, numbers), self.plan,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        for batch in batches:
            own = positions[batch.document][:, None]
            there = np.arange(batch.tokens.shape[1])[None] == own
            counts = np.asarray(batch.position_mask) & ((own == whole) | there)
            yield batch._replace(position_mask=counts)
