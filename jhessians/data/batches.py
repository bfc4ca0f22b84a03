"""A data set in batches, to go through as often as there are passes."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax

from jhessians.data.batching import Batch, BatchPlan, iterate_batches
from jhessians.data.documents import Documents
from jhessians.devices.place import move


@dataclass(frozen=True)
class Batches:
    """This host's rows of every batch.

    Attributes:
        documents: The data set.
        plan: How it is divided into batches.
    """

    documents: Documents
    plan: BatchPlan

    def __iter__(self) -> Iterator[Batch]:
        batches = iterate_batches(
            self.documents, self.plan,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        for number, batch in enumerate(batches):
            move(batch=number)
            with jax.profiler.StepTraceAnnotation("batch", step_num=number):
                yield batch

    def terms(self, unit: str) -> int:
        """How many terms a sum over the data set has.

        Args:
            unit: `position` for the positions that count, `document` for the documents that have
                some.

        Returns:
            Their number, over all hosts.
        """
        if unit == "position":
            return self.documents.positions
        return len(self.documents) - self.plan.skipped
