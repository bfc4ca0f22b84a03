"""How much data there is: documents, and the positions that count, over all batches and hosts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jhessians.capture.fold import Context
from jhessians.capture.problem import Problem, document_ids
from jhessians.capture.site import Site
from jhessians.capture.traversal import accumulate, initialize
from jhessians.typing import Array, PyTree


class Counts(NamedTuple):
    """What sums over a data set have.

    Attributes:
        positions: Those that count.
        documents: All of them.
        nonempty: The documents that have such a position.
    """

    positions: int
    documents: int
    nonempty: int

    def terms(self, unit: str) -> int:
        """How many terms a sum over the data set has.

        Args:
            unit: Of the sum, `position` or `document`.

        Returns:
            Positions that count, or documents that have one.
        """
        return self.positions if unit == "position" else self.nonempty


def count(problem: Problem, batches: Iterable[PyTree[np.ndarray]]) -> Counts:
    """Count what is in the batches of all hosts.

    Args:
        problem: Its mask says which positions count; without one all that its linears read do.
        batches: This host's rows of each batch. Rows whose entry `document` is negative are none.

    Returns:
        The counts. A document that no batch holds, such as one of a single token, isn't counted.

    Raises:
        ValueError: If there is no mask and the linears read different numbers of positions.
    """
    total = np.zeros(3, np.int64)
    read: dict[Any, int] = {}  # by the shapes of a batch without a mask
    for batch in batches:
        ids, mask = document_ids(batch), problem.mask(batch)
        rows = len(jax.tree.leaves(batch)[0])
        documents = rows if ids is None else int((np.asarray(ids) >= 0).sum())
        if mask is None:
            shapes = tuple(np.shape(x) for x in jax.tree.leaves(batch))
            if shapes not in read:
                read[shapes] = _positions_read(problem, batch)
            total += (read[shapes], documents, documents)
        else:
            mask = np.asarray(mask, bool)
            total += (int(mask.sum()), documents, int(mask.any(1).sum()))
    if problem.hosts > 1:
        from jax.experimental import multihost_utils

        halves = np.stack([total // 2**20, total % 2**20]).astype(np.int32)  # JAX has 32 bits
        high, low = multihost_utils.process_allgather(halves).astype(np.int64).sum(0)
        total = high * 2**20 + low
    return Counts(*map(int, total))


def _positions_read(problem: Problem, batch: PyTree[np.ndarray]) -> int:
    """How many positions of a batch without a mask the linears read, by a trace of it."""
    read: dict[str, int] = {}
    alone = Problem(problem.loss, problem.model, problem.sites, draws=problem.draws)
    fold = _Listening(_Read(read))

    def trace(batch: PyTree[Array]) -> Any:
        return accumulate(fold, alone, batch, initialize(fold, alone))

    jax.eval_shape(trace, batch)
    if len(set(read.values())) > 1:
        raise ValueError(
            f"without a mask the linears read different numbers of positions, such as {read}; "
            "give the number of positions, or batches with a position_mask"
        )
    return next(iter(read.values()), len(jax.tree.leaves(batch)[0]))


class _Read:
    """A dict that can be hashed, by its identity, as a part of a fold must be."""

    def __init__(self, positions: dict[str, int]):
        self.positions = positions


@dataclass(frozen=True)
class _Listening:
    """A fold that computes nothing, and notes how many positions each linear reads."""

    read: _Read

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.ShapeDtypeStruct((1,), jnp.float32)

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        if not site.routed:  # an expert reads some of the positions
            self.read.positions[site.name] = a.shape[0] * a.shape[1] // site.calls
        return jnp.zeros(1, jnp.float32)
