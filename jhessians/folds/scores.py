"""Scores: every document's inner products ⟨G_n, P_k⟩ with queries, added up over all linears.

G_n = Σ g aᵀ over the positions of document n that count, [out, in]; P_k is a query's gradient, as a
rule after the inverse Hessian. Influence of a document on a query: Koh & Liang 2017,
arXiv:1703.04730; with Kronecker factors Grosse et al. 2023, arXiv:2308.03296, section 3.

On a mesh no query is ever whole on a device. Devices exchange g by rows and gather a, so that each
has its rows of all documents' gradients; what travels are the tokens' vectors, not the matrices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.capture.fold import Context, Matrices
from jhessians.capture.site import Site
from jhessians.folds.covariance import masked, with_ones
from jhessians.typing import Array, DTypeLike, Float, PyTree

LARGEST = 2**26
"""Numbers that the gradients of some documents, or other intermediates, may have at once."""

CACHED, BLOCKS = 2**21, 8
"""Of gradients so many numbers at once stay in a processor's cache until queries have met them; but
each linear's rows are in at most so many blocks, each of which is compiled."""


@dataclass(frozen=True)
class Scores:
    """Each document's, or each token's, scores for all queries, [query].

    A site's operand is `queries`: `Matrices` of P, [query, out, in].

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
        queries: Matrices = operands["queries"]
        p = queries.values.astype(self.dtype)
        a = with_ones(a, site).astype(self.dtype)
        g = masked(g, context).astype(self.dtype)  # a need not be masked as well
        rows = p.shape[1] * context.shards
        g = jnp.pad(g, ((0, 0), (0, 0), (0, rows - g.shape[-1])))
        a, g = context.all_documents(a), context.own_rows(g)
        if self.tokens:
            scores = lax.map(lambda ag: _of_tokens(ag[0], ag[1], p), (a, g))
            return context.own_documents(calls_added(scores, site))
        return context.own_documents(_of_documents(a, g, p))


def _of_documents(
    a: Float[Array, "n s i"], g: Float[Array, "n s o"], p: Float[Array, "k o i"]
) -> Float[Array, "n k"]:
    """Form each document's gradient once, for all queries: some rows of it at a time."""
    _, o, i = p.shape
    block = max(-(-o // BLOCKS), CACHED // (len(a) * i), 1)

    def of_some(ag: tuple[Array, Array]) -> Float[Array, "m k"]:
        scores = jnp.zeros((len(ag[0]), len(p)), p.dtype)
        for start in range(0, o, block):
            rows = slice(start, min(start + block, o))
            gradients = jnp.einsum("nso,nsi->noi", ag[1][..., rows], ag[0])
            scores += _rows_by_rows(
                gradients.reshape(len(gradients), -1), p[:, rows].reshape(len(p), -1)
            )
        return scores

    at_once = max(1, LARGEST // (min(block, o) * i))
    if at_once >= len(a):
        return of_some((a, g))
    scores: Array = _in_parts(of_some, (a, g), at_once)
    return scores


def _of_tokens(
    a: Float[Array, "s i"], g: Float[Array, "s o"], p: Float[Array, "k o i"]
) -> Float[Array, "s k"]:
    """gᵀ P a of each position: first the product that leaves the smaller array."""
    smaller = min(p.shape[1:])

    def of_some(p: Float[Array, "m o i"]) -> Float[Array, "m s"]:
        if p.shape[2] <= p.shape[1]:
            return jnp.einsum("msi,si->ms", jnp.einsum("so,moi->msi", g, p), a)
        return jnp.einsum("mso,so->ms", jnp.einsum("si,moi->mso", a, p), g)

    at_once = max(1, LARGEST // (len(a) * smaller))
    scores = of_some(p) if at_once >= len(p) else _in_parts(of_some, p, at_once)
    return scores.T


@dataclass(frozen=True)
class SelfInfluence:
    """Each document's gᵀ H⁻¹ g = Σ multiplier ∘ (Q_Sᵀ G_n Q_A)², or without curvature Σ G_n².

    A site's operands are `activation`, its Q_A, `gradient`, its Q_S, and `multiplier` [out, in], by
    which the inverse scales coefficients in the eigenbasis (`jhessians.linalg.inverse`).

    Attributes:
        curvature: Whether there is a Hessian; without one there are no operands.
        dtype: Number format of products and sums.
    """

    curvature: bool = True
    dtype: DTypeLike = jnp.float32

    def joint_shapes(self, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """See `JointDocumentFold.joint_shapes`."""
        return jax.ShapeDtypeStruct((), self.dtype)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `JointDocumentFold.document_rows`."""
        a = with_ones(a, site).astype(self.dtype)
        g = masked(g, context).astype(self.dtype)
        if not self.curvature:
            return lax.map(lambda ag: jnp.square(ag[1].T @ ag[0]).sum(), (a, g))
        multiplier = context.gather_rows(operands["multiplier"], site.out_features)
        rotated = rotated_gradients(site, a, g, operands, context)
        return lax.map(lambda make: (multiplier * jnp.square(make)).sum(), rotated)


def rotated_gradients(
    site: Site,
    a: Float[Array, "n s i"],
    g: Float[Array, "n s o"],
    operands: Mapping[str, Any],
    context: Context,
) -> Float[Array, "n o i"]:
    """Documents' gradients in the eigenbasis, Q_Sᵀ G_n Q_A, from masked vectors.

    Either positions' vectors are rotated or gradients are, whichever is less arithmetic.

    Args:
        site: The linear.
        a: Its input, with the column of ones if the bias counts; its number format is computed in.
        g: The loss gradient at its output, zero where a position doesn't count.
        operands: `activation`, Q_A, and `gradient`, Q_S, both sharded by rows.
        context: Mesh.

    Returns:
        The coefficients of each document's gradient.
    """
    q_a = context.gather_rows(operands["activation"], site.inputs).astype(a.dtype)
    q_s = context.gather_rows(operands["gradient"], site.out_features).astype(a.dtype)
    positions = a.shape[1]
    vectors_first_a, vectors_first_g = positions <= site.out_features, positions <= site.inputs
    if vectors_first_a:
        a = a @ q_a
    if vectors_first_g:
        g = g @ q_s
    gradients = jnp.einsum("nso,nsi->noi", g, a)
    if not vectors_first_g:
        gradients = q_s.T @ gradients
    return gradients if vectors_first_a else gradients @ q_a


def calls_added(scores: Float[Array, "n s k"], site: Site) -> Float[Array, "n t k"]:
    """Positions' scores, where the positions of several calls follow one another."""
    n, s, k = scores.shape
    return scores.reshape(n, site.calls, s // site.calls, k).sum(1)


def _rows_by_rows(x: Float[Array, "n d"], y: Float[Array, "k d"]) -> Float[Array, "n k"]:
    return lax.dot_general(x, y, (((1,), (1,)), ((), ())))


def _in_parts(function: Any, xs: PyTree[Array], at_once: int) -> PyTree[Array]:
    """`function` of some entries at a time; the last part may overlap the one before it."""
    count = len(jax.tree.leaves(xs)[0])
    parts = math.ceil(count / at_once)
    starts = jnp.minimum(jnp.arange(parts) * at_once, count - at_once)
    first = jax.eval_shape(
        function, jax.tree.map(lambda x: jax.ShapeDtypeStruct((at_once, *x.shape[1:]), x.dtype), xs)
    )
    whole = jnp.zeros((count, *first.shape[1:]), first.dtype)

    def step(number: Array, whole: Array) -> Array:
        start = starts[number]
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, at_once), xs)
        return lax.dynamic_update_slice_in_dim(whole, function(part), start, 0)

    return lax.fori_loop(0, parts, step, whole)
