"""One row for every document of a data set, in its order; or batch by batch, as they are made."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jhessians.capture.checks import fold_name
from jhessians.capture.documents import (
    DocumentFold,
    JointDocumentFold,
    PerDocument,
    PerDocumentJointly,
)
from jhessians.capture.problem import Problem, document_ids
from jhessians.capture.site import Operands
from jhessians.capture.traversal import accumulate, initialize
from jhessians.devices.hosts import fetch
from jhessians.devices.memory import return_freed_memory
from jhessians.devices.mesh import platform_of, put_batches
from jhessians.errors import NumericsError
from jhessians.fitting.passes import COMPILER_OPTIONS, check_fold, untraced
from jhessians.typing import PyTree


class BatchRows(NamedTuple):
    """What a fold gives for the documents of one batch.

    Attributes:
        documents: The numbers of the documents in the data, [row]; -1 for rows that only fill up
            the batch.
        rows: By site, or of all linears together, arrays [row, …] on the devices; in stacks
            [member, row, …]. Rows that only fill up hold nothing of use.
    """

    documents: np.ndarray
    rows: PyTree[Any]


class DocumentPass:
    """A fold's pass that sums nothing over documents, compiled once for each shape of a batch.

    Args:
        fold: What to compute for each document: at every linear, or of all linears together.
        problem: Loss, model, linears and devices, with one draw of labels.
        finish: Makes what is wanted of a batch's rows, inside the compiled step.

    Raises:
        ValueError: If the problem has several draws of labels, whose rows would be added.
    """

    def __init__(
        self,
        fold: DocumentFold | JointDocumentFold,
        problem: Problem,
        *,
        finish: Callable[[PyTree[Any], PyTree[Any]], PyTree[Any]] = lambda rows, operands: rows,
    ):
        if problem.draws != 1:
            raise ValueError(f"{problem.draws} draws would be added up in a row; expected 1")
        self.fold, self.problem, self._checked = fold, problem, False
        graph, self._state = nnx.split(problem.model)

        @partial(jax.jit, compiler_options=COMPILER_OPTIONS.get(platform_of(problem.mesh)))
        def step(state, batch, operands, finishing):
            here = problem.of(nnx.merge(graph, state))
            each = self._each(batch, hosts=1)
            zeros = initialize(each, here)
            rows, loss = accumulate(each, here, batch, zeros, operands=operands)
            return finish(rows, finishing), loss

        self._step = step

    def run(
        self,
        batches: Iterable[PyTree[np.ndarray]],
        *,
        operands: Operands | None = None,
        finishing: PyTree[Any] = None,
        ahead: bool = True,
        advance: Callable[[int], None] = lambda positions: None,
    ) -> Iterator[BatchRows]:
        """The rows of each batch in turn.

        Args:
            batches: This host's rows of each batch. Their entry `document` says which document of
                the data a row is, -1 for none; without it rows count in the order in which they
                come.
            operands: Further arrays that the fold needs, by site.
            finishing: Further arrays that `finish` needs, its second argument.
            ahead: Whether the devices compute the next batch's rows while the caller has one's,
                so that two are in memory.
            advance: Called when a batch is done, with how many of its positions counted.

        Yields:
            Documents and rows.

        Raises:
            TypeError: Inside a caller's own jit.
            FoldError: If the fold's rows don't fit its shapes.
            NumericsError: If a batch's loss isn't finite.
        """
        running, seen = None, 0
        for number, batch in enumerate(untraced(self.problem, batches), start=1):
            if not self._checked:
                each = self._each(batch, hosts=self.problem.hosts)
                zeros = jax.eval_shape(partial(initialize, each, self.problem))
                check_fold(each, self.problem, batch, zeros, operands)
                self._checked = True
            whole = self._on_devices(batch)
            rows, loss = self._step(self._state, whole, operands or {}, finishing)
            count = len(jax.tree.leaves(whole)[0])
            numbers = document_ids(whole)
            seen += count
            numbers = np.arange(seen - count, seen) if numbers is None else numbers
            if running:
                yield self._finished(*running, advance)
            running = (number, batch, numbers, rows, loss)
            del rows
            if number == 1:  # it was compiled just now
                return_freed_memory()
            if not ahead:
                yield self._finished(*running, advance)
                running = None
        if running:
            yield self._finished(*running, advance)

    def _each(self, batch: PyTree[Any], *, hosts: int) -> PerDocument | PerDocumentJointly:
        """The fold as one whose statistics are the rows of a batch."""
        documents = len(jax.tree.leaves(batch)[0]) * hosts
        if isinstance(self.fold, DocumentFold):
            return PerDocument(self.fold, documents)
        mask = self.problem.mask(batch)
        if mask is None:
            raise ValueError(
                f"{fold_name(self.fold)} needs the mask of the positions that count; expected "
                "batches with a position_mask"
            )
        return PerDocumentJointly(self.fold, documents, mask.shape[1])

    def _on_devices(self, batch: PyTree[np.ndarray]) -> PyTree[Any]:
        # The leading axis is that of batches that go to the devices together: here one.
        alone = put_batches(jax.tree.map(lambda x: np.asarray(x)[None], batch), self.problem.mesh)
        return jax.tree.map(lambda x: x[0], alone)

    def _finished(self, number, batch, numbers, rows, loss, advance) -> BatchRows:
        if not np.isfinite(fetch(loss)):
            raise NumericsError(
                f"the loss of batch {number} is not finite; check the weights, or compute in "
                "float32 (`precision` fp32)"
            )
        mask = self.problem.mask(batch)
        if mask is not None:
            advance(int(mask.sum()) * self.problem.hosts)
        return BatchRows(fetch(jnp.asarray(numbers)), rows)


def map_documents(
    fold: DocumentFold,
    problem: Problem,
    batches: Iterable[PyTree[np.ndarray]],
    *,
    documents: int | None = None,
    operands: Operands | None = None,
) -> dict[str, Any]:
    """What a fold gives for each document, nothing summed over documents.

    Only the rows of one batch are on the devices at a time; all of them are held by every host.

    Args:
        fold: Such as `DocumentGradients`, or `GradientRows` for projected gradients.
        problem: Loss, model, linears and devices, with one draw of labels.
        batches: This host's rows of each batch. Their entry `document` says which document of the
            data a row is, -1 for none; without it rows count in the order in which they come.
        documents: How many the data has; by default as many as the largest number says.
        operands: Further arrays that the fold needs, by site, as from `row_operands`.

    Returns:
        Module's full name → the fold's `document_shapes`, with a leading document axis, in the
        data's order. A document that is in no batch has zeros.

    Raises:
        ValueError: If there are several draws, whose rows would be added, or no batches; if a
            document is in two rows, or has a number that `documents` doesn't allow.
        TypeError: Inside a caller's own jit.
        FoldError: If the fold's rows don't fit its shapes.
        NumericsError: If a batch's loss isn't finite.
    """
    each = DocumentPass(fold, problem).run(batches, operands=operands)
    found = [(numbers, jax.tree.map(fetch, rows)) for numbers, rows in each]
    if not found:
        raise ValueError("there are no batches; expected at least one")
    ids = [numbers for numbers, _ in found]
    length = count_documents(ids, documents)
    return {
        module: jax.tree.map(
            lambda *parts: in_order(parts, ids, length),
            *[member_rows(rows[site.name], slot) for _, rows in found],
        )
        for site in problem.sites.values()
        for slot, module in zip(site.slots, site.module_names(), strict=True)
    }


def count_documents(ids: list[np.ndarray], documents: int | None) -> int:
    """How many rows a result has, one for each document.

    Args:
        ids: The documents' numbers in each batch, negative ones of no document.
        documents: How many the data has, if that is known.

    Returns:
        `documents`, or one more than the largest number.

    Raises:
        ValueError: If a document is in two rows, or has a number that `documents` doesn't allow.
    """
    found, times = np.unique(np.concatenate(ids), return_counts=True)
    times = times[found >= 0]
    found = found[found >= 0]
    if (times > 1).any():
        raise ValueError(
            f"document {found[times > 1][0]} is in {times[times > 1][0]} rows; expected each in "
            "one: give batches whose `document` numbers are all different"
        )
    largest = int(found.max(initial=-1))
    if documents is not None and largest >= documents:
        raise ValueError(f"there is a document {largest}; expected numbers below {documents}")
    return largest + 1 if documents is None else documents


def member_rows(tree: PyTree[Any], slot: int | None) -> PyTree[Any]:
    """One module's rows.

    Args:
        tree: A site's rows, [document, …], in stacks [member, document, …].
        slot: The module's index on the member axis; None outside a stack.

    Returns:
        [document, …].
    """
    return tree if slot is None else jax.tree.map(lambda x: x[slot], tree)


def in_order(parts: Iterable[np.ndarray], ids: list[np.ndarray], length: int) -> np.ndarray:
    """Put the rows of all batches where their documents stand in the data.

    Args:
        parts: Each batch's rows, [row, …].
        ids: The documents' numbers in each batch, negative ones of no document.
        length: How many documents the data has.

    Returns:
        [document, …]; zeros for a document that is in no batch.
    """
    parts = list(parts)
    result = np.zeros((length, *parts[0].shape[1:]), parts[0].dtype)
    for part, numbers in zip(parts, ids, strict=True):
        real = numbers >= 0
        result[numbers[real]] = part[: len(numbers)][real]
    return result
