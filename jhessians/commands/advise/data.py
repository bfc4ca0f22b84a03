"""The data of `advise`: what is held out, and two halves of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jhessians.data.batches import Batches
from jhessians.data.batching import Batch, plan_batches
from jhessians.data.documents import Documents
from jhessians.data.selecting import select
from jhessians.errors import DatasetError

FEWEST = 8
"""Documents with a token to predict that there must be."""

SHARE = 8
"""At most one in so many documents is held out as a query, and as many to judge damping factors."""


class Division(NamedTuple):
    """Numbers of documents, ascending; no document is in two of them.

    Attributes:
        queries: Whose gradients inverses are applied to.
        held_out: Whose Gauss-Newton Hessian judges damping factors.
        halves: Two sets of the same size.
    """

    queries: Int[np.ndarray, " document"]
    held_out: Int[np.ndarray, " document"]
    halves: tuple[Int[np.ndarray, " document"], Int[np.ndarray, " document"]]


def divide(
    documents: Documents, *, queries: int, held_out: int, half: int | None, seed: int
) -> Division:
    """Divide a data set at random.

    Args:
        documents: The data set; documents under two tokens, which have no gradient, are left out.
        queries: How many are queries, at most.
        held_out: How many judge damping factors, at most.
        half: How many are in each half, at most; None for half of the others.
        seed: Of the draw.

    Returns:
        The division.

    Raises:
        DatasetError: If there are too few documents.
    """
    usable = np.flatnonzero(documents.lengths > 1)
    if len(usable) < FEWEST:
        raise DatasetError(
            f"the data set has {len(usable)} documents of two tokens or more; expected {FEWEST} or "
            "more to divide: read the factors alone with `spectrum_only`"
        )
    order = np.random.default_rng(seed).permutation(usable)
    queries, held_out = (min(count, len(usable) // SHARE) for count in (queries, held_out))
    start = queries + held_out
    size = (len(usable) - start) // 2
    if half is not None:
        if half > size:
            raise DatasetError(
                f"`half_documents` is {half}, but {size} documents for each half are left of "
                f"{len(usable)}; give fewer, or leave it out"
            )
        size = half
    parts = (order[:queries], order[queries:start], order[start : start + size],
             order[start + size : start + 2 * size])  # fmt: skip
    of_queries, of_held_out, first, second = map(np.sort, parts)
    return Division(of_queries, of_held_out, (first, second))


@dataclass(frozen=True)
class Part(Batches):
    """Some documents of a data set, in batches that number them as the data set does.

    A sampled label depends on its document's number. So it is the same as in the whole.

    Attributes:
        numbers: Of the documents in the data set.
    """

    numbers: Int[np.ndarray, " document"]

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            number = np.where(batch.document < 0, -1, self.numbers[batch.document])
            yield batch._replace(document=number.astype(np.int32))


def part(
    documents: Documents,
    numbers: Int[np.ndarray, " document"],
    *,
    token_batch_size: int,
    devices: int,
    positions: int,
) -> Part:
    """Some documents in batches.

    Args:
        documents: All of them.
        numbers: Which ones.
        token_batch_size: Tokens that a device takes at once.
        devices: Over how many the documents of a batch are divided.
        positions: That the model has.

    Returns:
        The batches.
    """
    chosen = select(documents, numbers)
    plan = plan_batches(
        chosen.lengths, token_batch_size=token_batch_size, devices=devices, max_length=positions
    )
    return Part(chosen, plan, numbers)
