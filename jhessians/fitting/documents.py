"""One row for every document of a data set, in its order."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jhessians.capture.documents import DocumentFold, PerDocument
from jhessians.capture.problem import Problem, document_ids
from jhessians.capture.site import Operands
from jhessians.capture.traversal import accumulate, initialize
from jhessians.devices.hosts import fetch
from jhessians.devices.mesh import put_batches
from jhessians.errors import NumericsError
from jhessians.fitting.passes import COMPILER_OPTIONS, check_fold, untraced
from jhessians.typing import PyTree


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
    if problem.draws != 1:
        raise ValueError(f"{problem.draws} draws would be added up in a row; expected 1")
    graph, state = nnx.split(problem.model)

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))
    def step(state, batch, operands):
        each = PerDocument(fold, len(jax.tree.leaves(batch)[0]))
        here = problem.of(nnx.merge(graph, state))
        return accumulate(each, here, batch, initialize(each, here), operands=operands)

    found: list[tuple[np.ndarray, dict[str, Any]]] = []
    seen = 0
    for number, batch in enumerate(untraced(problem, batches), start=1):
        if number == 1:
            each = PerDocument(fold, len(jax.tree.leaves(batch)[0]) * problem.hosts)
            zeros = jax.eval_shape(partial(initialize, each, problem))
            check_fold(each, problem, batch, zeros, operands)
        # The leading axis is that of batches that go to the devices together: here one.
        alone = put_batches(jax.tree.map(lambda x: np.asarray(x)[None], batch), problem.mesh)
        whole = jax.tree.map(lambda x: x[0], alone)
        rows, loss = step(state, whole, operands or {})
        if not np.isfinite(fetch(loss)):
            raise NumericsError(
                f"the loss of batch {number} is not finite; check the weights, or compute in "
                "float32 (`precision` fp32)"
            )
        count = len(jax.tree.leaves(whole)[0])
        numbers = document_ids(whole)
        numbers = np.arange(seen, seen + count) if numbers is None else fetch(jnp.asarray(numbers))
        seen += count
        found.append((numbers, jax.tree.map(fetch, rows)))
    if not found:
        raise ValueError("there are no batches; expected at least one")
    ids = [numbers for numbers, _ in found]
    length = _length(ids, documents)
    return {
        module: jax.tree.map(
            lambda *parts: _in_order(parts, ids, length),
            *[_member(rows[site.name], slot) for _, rows in found],
        )
        for site in problem.sites.values()
        for slot, module in zip(site.slots, site.module_names(), strict=True)
    }


def _length(ids: list[np.ndarray], documents: int | None) -> int:
    """How many rows the result has."""
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


def _member(tree: PyTree[np.ndarray], slot: int | None) -> PyTree[np.ndarray]:
    """One module's rows of a stack's, [document, …]."""
    return tree if slot is None else jax.tree.map(lambda x: x[slot], tree)


def _in_order(parts: Iterable[np.ndarray], ids: list[np.ndarray], length: int) -> np.ndarray:
    """The rows of all batches where their documents stand in the data."""
    parts = list(parts)
    result = np.zeros((length, *parts[0].shape[1:]), parts[0].dtype)
    for part, numbers in zip(parts, ids, strict=True):
        real = numbers >= 0
        result[numbers[real]] = part[: len(numbers)][real]
    return result
