"""Autocorrelation Hessians: the Gram matrix Σ_n row_nᵀ row_n of documents' gradients as rows.

A row is a module's gradient on one document (or one token), normalised and projected as
`jhessians.folds.rows` says. Divided by their number, the sum is the mean outer product of a row
with itself: the kernel of TRAK (Park et al. 2023, arXiv:2303.14186) and of TrackStar (Chang et al.
2024, arXiv:2410.17413).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.folds.rows import GradientRows
from jhessians.typing import Array, Float, PyTree, UInt32


@dataclass(frozen=True)
class Gram:
    """One Gram matrix per module, or one per head of a module that is split: [heads · d, d].

    Attributes:
        rows: Makes the rows; a site's operands are those that it asks for.
    """

    rows: GradientRows

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """[heads · d, d], the heads' matrices one below the other; see `Fold.shapes`."""
        d = self.rows.unit_size(site)
        return jax.ShapeDtypeStruct((self.rows.head_count(site) * d, d), self.rows.dtype)

    def term(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """Σ_n row_nᵀ row_n of these documents, for each head; see `Fold.term`."""
        u, v, factor = self.rows.factors(site, a, g, operands, context)
        keys = self.rows.unit_keys(site, operands, context, count=2)
        grams = jax.vmap(self._of_unit, in_axes=(0, None, 0, 0))(u, v, factor, keys)
        return grams.reshape(-1, grams.shape[-1])

    def _of_unit(
        self,
        u: Float[Array, "n s t o"],
        v: Float[Array, "n s t i"],
        factor: Float[Array, "o i"] | None,
        keys: UInt32[Array, "2 2"] | None,
    ) -> Float[Array, "d d"]:
        if not self.rows.tokens:
            return _gram(self.rows.of_unit(u, v, factor, keys))
        d = jax.eval_shape(self.rows.of_unit, u, v, factor, keys).shape[-1]

        # One document at a time: the rows of all documents' tokens may not fit in memory.
        def add(total: Array, document: tuple[Array, Array]) -> tuple[Array, None]:
            one_u, one_v = document
            rows = self.rows.of_unit(one_u[None], one_v[None], factor, keys)
            return total + _gram(rows[0]), None

        return lax.scan(add, jnp.zeros((d, d), self.rows.dtype), (u, v))[0]


@dataclass(frozen=True)
class JointGram:
    """One Gram matrix [p, p] for all modules together, whose projections add up to one row.

    Attributes:
        rows: Makes each module's share of the rows; must have a projection.
    """

    rows: GradientRows
    joint = "joint"

    def shapes(self) -> PyTree[jax.ShapeDtypeStruct]:
        """[p, p]; see `JointFold.shapes`."""
        assert self.rows.projection is not None
        p = self.rows.projection.dimension
        return jax.ShapeDtypeStruct((p, p), self.rows.dtype)

    def row_shapes(self, documents: int, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """[document, p], of tokens [document, position, p]; see `JointFold.row_shapes`."""
        assert self.rows.projection is not None
        shape = (documents, *([positions] if self.rows.tokens else []),
                 self.rows.projection.dimension)  # fmt: skip
        return jax.ShapeDtypeStruct(shape, self.rows.dtype)

    def term(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """A module's projected gradients, its heads added up; see `JointFold.term`."""
        u, v, factor = self.rows.factors(site, a, g, operands, context)
        blocks = len(self.rows.global_keys(site, "")) // self.rows.head_count(site)
        keys = self.rows.unit_keys(site, operands, context, count=blocks)
        assert keys is not None
        shares = jax.vmap(self.rows.global_share, in_axes=(0, None, 0, 0))(u, v, factor, keys)
        return shares.sum(0)

    def finish_rows(self, rows: Float[Array, "n *s p"]) -> PyTree[Array]:
        """Σ rowᵀ row over these rows; see `JointFold.finish_rows`."""
        return _gram(rows.reshape(-1, rows.shape[-1]))


def _gram(rows: Float[Array, "n d"]) -> Float[Array, "d d"]:
    return rows.T @ rows
