"""Scores in the space of gradient rows: normalised, projected, flattened (`folds/rows.py`).

⟨row_n, H⁻¹ row_k⟩, where H is a dense matrix over the rows of a module, of each of its heads, or,
for the global projection, over the sums of all modules' rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jhessians.capture.fold import Context, Matrices
from jhessians.capture.site import Site
from jhessians.folds.rows import GradientRows
from jhessians.typing import Array, Float, PyTree


@dataclass(frozen=True)
class RowQueries:
    """Each document's H⁻¹ row, as a matrix of one column, in the form of `folds.queries.Queries`.

    A site's operands are those of its rows and, with a Hessian, `inverse`: [heads · d, d].

    Attributes:
        rows: Makes the rows, of documents.
        curvature: Whether there is a Hessian.
    """

    rows: GradientRows
    curvature: bool = True

    def document_shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """See `Queries.document_shapes`."""
        size = self.rows.head_count(site) * self.rows.unit_size(site)
        shapes: dict[str, tuple[int, ...]] = {"self": (), "square": (), "kept": ()}
        shapes["matrix"] = (size, 1)
        dtype = self.rows.dtype
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `DocumentFold.document_rows`."""
        rows = self.rows.document_rows(site, a, g, operands, context)
        rows = rows.reshape(len(rows), self.rows.head_count(site), -1)
        applied = rows
        if self.curvature:
            applied = jnp.einsum("nhd,hde->nhe", rows, _inverse(self.rows, site, operands, context))
        square = jnp.square(applied).sum((1, 2))
        return {
            "self": (rows * applied).sum((1, 2)), "square": square, "kept": square,
            "matrix": applied.reshape(len(rows), -1, 1),
        }  # fmt: skip


@dataclass(frozen=True)
class RowScores:
    """Each document's, or each token's, scores for all queries, [query].

    A site's operands are those of its rows, and `queries`: `Matrices` [query, heads · d, 1].

    Attributes:
        rows: Makes the rows, of documents or of tokens.
        queries: How many there are.
    """

    rows: GradientRows
    queries: int

    def joint_shapes(self, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """See `JointDocumentFold.joint_shapes`."""
        shape = (positions, self.queries) if self.rows.tokens else (self.queries,)
        return jax.ShapeDtypeStruct(shape, self.rows.dtype)

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
        p = queries.values[..., 0].astype(self.rows.dtype)
        rows = site_rows(self.rows, site, a, g, operands, context)
        rows = rows.reshape(*rows.shape[:2], -1)
        missing = p.shape[1] * context.shards - rows.shape[-1]
        rows = context.own_rows(jnp.pad(rows, ((0, 0), (0, 0), (0, missing))))
        scores = context.own_documents(jnp.einsum("nsd,kd->nsk", rows, p))
        return scores if self.rows.tokens else scores[:, 0]


@dataclass(frozen=True)
class RowSelfInfluence:
    """Each document's row · H⁻¹ row, summed over modules; operands as in `RowQueries`.

    Attributes:
        rows: Makes the rows, of documents.
        curvature: Whether there is a Hessian.
    """

    rows: GradientRows
    curvature: bool = True

    def joint_shapes(self, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """See `JointDocumentFold.joint_shapes`."""
        return jax.ShapeDtypeStruct((), self.rows.dtype)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `JointDocumentFold.document_rows`."""
        of_queries = RowQueries(self.rows, self.curvature)
        return of_queries.document_rows(site, a, g, operands, context)["self"]


@dataclass(frozen=True)
class JointRows:
    """The rows of the global projection: sums of all modules' shares, [p].

    Attributes:
        rows: Makes each module's share, of documents or of tokens; must have a projection.
    """

    rows: GradientRows

    def joint_shapes(self, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """See `JointDocumentFold.joint_shapes`."""
        assert self.rows.projection is not None
        p = self.rows.projection.dimension
        return jax.ShapeDtypeStruct((positions, p) if self.rows.tokens else (p,), self.rows.dtype)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """See `JointDocumentFold.document_rows`."""
        u, v, factor = self.rows.factors(site, a, g, operands, context)
        count = len(self.rows.global_keys(site, "")) // self.rows.head_count(site)
        keys = self.rows.unit_keys(site, operands, context, count=count)
        assert keys is not None
        share = jax.vmap(self.rows.global_share, in_axes=(0, None, 0, 0))
        return share(u, v, factor, keys).sum(0)


def site_rows(
    rows: GradientRows,
    site: Site,
    a: Float[Array, "n s i"],
    g: Float[Array, "n s o"],
    operands: Mapping[str, Any],
    context: Context,
) -> Float[Array, "n t h d"]:
    """A site's rows by head: of each token, or the one of each document."""
    u, v, factor = rows.factors(site, a, g, operands, context)
    keys = rows.unit_keys(site, operands, context, count=2)
    found = jax.vmap(rows.of_unit, in_axes=(0, None, 0, 0), out_axes=-2)(u, v, factor, keys)
    return found if rows.tokens else found[:, None]


def _inverse(
    rows: GradientRows, site: Site, operands: Mapping[str, Any], context: Context
) -> Float[Array, "h d d"]:
    heads, d = rows.head_count(site), rows.unit_size(site)
    whole = context.gather_rows(operands["inverse"], heads * d)
    return whole.reshape(heads, d, d).astype(rows.dtype)
