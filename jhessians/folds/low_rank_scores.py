"""Scores for queries of low rank, whose products with a document's vectors cost little.

P_k ≈ Σ_r left_kr right_krᵀ, so that ⟨G_n, P_k⟩ = Σ_s Σ_r (g_s · left_kr) (a_s · right_kr), and no
gradient need be formed. On a mesh each device has some of the queries, and sees all documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.folds.covariance import masked, with_ones
from jhessians.folds.scores import LARGEST, calls_added
from jhessians.typing import Array, DTypeLike, Float, PyTree


@dataclass(frozen=True)
class LowRankScores:
    """Scores for queries that are kept as products of low rank, P_k ≈ Σ_r left_kr right_krᵀ.

    A site's operands are `left`, [query, rank, out], and `right`, [query, rank, in]; their rows, by
    which they are sharded, are queries.

    Attributes:
        queries: How many there are.
        tokens: Whether each position has scores of its own, [position, query].
        dtype: Number format of products and sums.
    """

    queries: int
    tokens: bool = False
    dtype: DTypeLike = jnp.float32

    def joint_shapes(self, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """See `JointDocumentFold.joint_shapes`."""
        shape = (positions, self.queries) if self.tokens else (self.queries,)
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `JointDocumentFold.document_rows`."""
        left, right = (operands[name].astype(self.dtype) for name in ("left", "right"))
        a = with_ones(a, site).astype(self.dtype)
        g = masked(g, context).astype(self.dtype)
        a, g = context.all_documents(a), context.all_documents(g)
        order = cheapest_order(
            site, positions=a.shape[1], queries=len(left), rank=left.shape[1], tokens=self.tokens
        )
        if order == "vectors":
            scores = _of_vectors(a, g, left, right, tokens=self.tokens)
            if self.tokens:
                scores = calls_added(scores, site)
        else:
            scores = _of_gradients(a, g, left, right)
        # Each device knows its own queries' scores of all documents.
        everyone = jnp.zeros((*scores.shape[:-1], len(left) * context.shards), scores.dtype)
        start = len(left) * _device_number(context)
        everyone = lax.dynamic_update_slice_in_dim(everyone, scores, start, scores.ndim - 1)
        return context.own_documents(everyone)[..., : self.queries]


def cheapest_order(
    site: Site, *, positions: int, queries: int, rank: int | None, tokens: bool = False
) -> Literal["gradients", "vectors"]:
    """Whether to form each document's gradient, or to multiply its vectors with low-rank queries.

    Args:
        site: The linear.
        positions: Of a document.
        queries: How many.
        rank: Of the queries; None if they are whole.
        tokens: Whether each position has scores of its own.

    Returns:
        The order of products with the fewest multiplications.
    """
    if tokens:
        return "vectors"
    if rank is None:
        return "gradients"
    i, o = site.inputs, site.out_features
    gradients = positions * o * i + queries * rank * (o * i + min(o, i))
    vectors = positions * queries * rank * (o + i + 1)
    return "vectors" if vectors <= gradients else "gradients"


def _of_vectors(
    a: Float[Array, "n s i"],
    g: Float[Array, "n s o"],
    left: Float[Array, "k r o"],
    right: Float[Array, "k r i"],
    *,
    tokens: bool,
) -> Float[Array, "n *s k"]:
    def of_document(ag: tuple[Array, Array]) -> Float[Array, "*s k"]:
        u = jnp.einsum("so,kro->skr", ag[1], left)
        v = jnp.einsum("si,kri->skr", ag[0], right)
        return jnp.einsum("skr,skr->sk" if tokens else "skr,skr->k", u, v)

    at_once = max(1, LARGEST // (a.shape[1] * left.shape[0] * left.shape[1]))
    scores: Array = lax.map(of_document, (a, g), batch_size=min(at_once, len(a)))
    return scores


def _of_gradients(
    a: Float[Array, "n s i"],
    g: Float[Array, "n s o"],
    left: Float[Array, "k r o"],
    right: Float[Array, "k r i"],
) -> Float[Array, "n k"]:
    def of_document(ag: tuple[Array, Array]) -> Float[Array, " k"]:
        gradient = ag[1].T @ ag[0]
        return jnp.einsum("kro,kro->k", jnp.einsum("oi,kri->kro", gradient, right), left)

    scores: Array = lax.map(of_document, (a, g))
    return scores


def _device_number(context: Context) -> Array | int:
    """This device's place among those that rows are sharded over."""
    number: Array | int = 0
    for axis in context.axes:
        number = number * lax.axis_size(axis) + lax.axis_index(axis)
    return number
