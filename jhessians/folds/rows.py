"""A document's or a token's gradient as a row: scaled by a normalizer, projected, flattened.

G = Σ g aᵀ over a document's positions, [out, in], with the bias's column last where it counts.
There are three kinds of rows:

- vec(L G Rᵀ), [p · p], where L [p, out] and R [p, in] are random matrices that follow from the
  module's name (`jhessians.linalg.projection`);
- vec(G), without a projection;
- a share of one row of p numbers to which all modules add, for the global target.

Adam's normalizer scales every entry of G, which must be formed first; Adafactor's scales g and a.

A module may be split into attention heads, which are slices of g. The random matrices of a head
follow from the name "<module>.head_<h>". As in torch bergson, the heads of a module share its right
matrix, unless the bias counts or there is an Adam normalizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.errors import ConfigError
from jhessians.folds.covariance import masked, with_ones
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer, Normalizer
from jhessians.linalg.projection import Projection, Role, project_global
from jhessians.typing import Array, DTypeLike, Float, PyTree, UInt32

TOKENS_AT_ONCE = 16  # whose gradients exist together where Adam scales every entry


class Factors(NamedTuple):
    """Gradients as sums over `t` of outer products u vᵀ, and factors for their entries.

    Attributes:
        u: [head, document, position, t, out], where `out` counts one head's outputs.
        v: [document, position, t, in].
        factor: [head, out, in]; None if no entry is scaled.
    """

    u: Float[Array, "h n s t o"]
    v: Float[Array, "n s t i"]
    factor: Float[Array, "h o i"] | None


@dataclass(frozen=True)
class GradientRows:
    """How rows are made.

    A site's operands are `keys`, those of its random matrices, and perhaps a `normalizer`.

    Attributes:
        projection: The random matrices; None for whole gradients.
        tokens: Whether a row is a position's gradient instead of a document's.
        split: Names of the sites that are split into heads.
        heads: How many heads each of them has.
        dtype: Number format of the computation.
    """

    projection: Projection | None = None
    tokens: bool = False
    split: tuple[str, ...] = ()
    heads: int = 1
    dtype: DTypeLike = jnp.float32

    def head_count(self, site: Site) -> int:
        """Heads that a site is split into, 1 if it is not."""
        return self.heads if site.name in self.split else 1

    def unit_names(self, site: Site, module: str) -> list[str]:
        """What a module's Hessians are called.

        Args:
            site: The linear that the module is of; says whether it is split.
            module: The module's full name.

        Returns:
            The module's name, or "<module>.head_<h>" for each head.
        """
        if site.name not in self.split:
            return [module]
        return [f"{module}.head_{head}" for head in range(self.heads)]

    def unit_size(self, site: Site) -> int:
        """How many numbers a row of the linear has, or of one of its heads."""
        if self.projection is None:
            return site.out_features // self.head_count(site) * site.inputs
        return self.projection.dimension**2

    def matrix_keys(
        self, site: Site, module: str, normalizer: Normalizer | None
    ) -> UInt32[np.ndarray, "k 2"]:
        """Keys of the random matrices of a module; there must be a projection.

        Args:
            site: The linear that the module is of.
            module: The module's full name, from which the keys follow.
            normalizer: What scales its gradients, if anything; with Adam's, and where the bias
                counts, each head has a right matrix of its own.

        Returns:
            For each head, the left matrix's key and the right one's.
        """
        assert self.projection is not None
        shares_right = not site.ones and not isinstance(normalizer, AdamNormalizer)
        roles: list[tuple[str, Role]] = []
        for unit in self.unit_names(site, module):
            roles += [(unit, "left"), (module if shares_right else unit, "right")]
        return np.stack([self.projection.key(*role) for role in roles])

    def global_keys(self, site: Site, module: str) -> UInt32[np.ndarray, "k 2"]:
        """Keys of a module's part of the global matrix; there must be a projection.

        Args:
            site: The linear that the module is of.
            module: The module's full name, from which the keys follow.

        Returns:
            For each head, the keys of all its blocks of columns.
        """
        assert self.projection is not None
        columns = site.out_features // self.head_count(site) * site.inputs
        units = self.unit_names(site, module)
        return np.concatenate([self.projection.global_keys(unit, columns) for unit in units])

    def document_shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """The row of one document, for `jhessians.map_documents`.

        Args:
            site: The linear.

        Returns:
            [d], or [head, d] of a module that is split into heads.

        Raises:
            ConfigError: If rows are of tokens.
        """
        if self.tokens:
            raise ConfigError("the rows are of tokens; expected rows of documents: tokens=False")
        heads = (self.heads,) if site.name in self.split else ()
        return jax.ShapeDtypeStruct((*heads, self.unit_size(site)), self.dtype)

    def document_rows(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """The batch's rows; see `DocumentFold.document_rows`."""
        u, v, factor = self.factors(site, a, g, operands, context)
        keys = self.unit_keys(site, operands, context, count=2)
        rows = jax.vmap(self.of_unit, in_axes=(0, None, 0, 0), out_axes=1)(u, v, factor, keys)
        return rows.reshape(len(rows), *self.document_shapes(site).shape)

    def factors(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> Factors:
        """A site's scaled gradients by head; a module that isn't split is one head.

        Where a row is one token's, what several calls of the linear contribute to a token are
        terms of the same row.

        Args:
            site: The linear.
            a: Its input, without the column of ones for the bias.
            g: The loss gradient at its output.
            operands: Its `normalizer`, if there is one, sharded by rows.
            context: Mask and mesh.

        Returns:
            u, v and the factor, in the number format `dtype`; positions that don't count are zero.

        Raises:
            ConfigError: If the bias counts and the normalizer has no second moment of it.
        """
        factors = self._scaled(site, a, g, operands, context)
        if not self.tokens or site.calls == 1:
            return factors

        def calls_as_terms(x: Array) -> Array:
            *before, positions, terms, features = x.shape
            x = x.reshape(*before, site.calls, positions // site.calls, terms, features)
            x = jnp.moveaxis(x, -4, -3)
            return x.reshape(*before, positions // site.calls, site.calls * terms, features)

        return factors._replace(u=calls_as_terms(factors.u), v=calls_as_terms(factors.v))

    def _scaled(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> Factors:
        heads = self.head_count(site)
        a = a.astype(self.dtype)
        g = masked(g, context).astype(self.dtype)  # a need not be masked as well
        g = jnp.moveaxis(g.reshape(*g.shape[:2], heads, -1), 2, 0)
        normalizer = self._normalizer(site, operands, context)
        if normalizer is None:
            return Factors(g[:, :, :, None], with_ones(a, site)[:, :, None], None)
        if isinstance(normalizer, AdamNormalizer):
            factor = (1 / normalizer.denominator(include_bias=site.ones)).astype(self.dtype)
            return Factors(g[:, :, :, None], with_ones(a, site)[:, :, None], factor)
        u = g * normalizer.g_factor().astype(self.dtype)[:, None, None]
        v = a * normalizer.a_factor()[0].astype(self.dtype)[None, None]
        if not site.ones:
            return Factors(u[:, :, :, None], v[:, :, None], None)
        # The bias's column has a scale of its own, hence a second outer product.
        of_bias = g * normalizer.bias_factor().astype(self.dtype)[:, None, None]
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 1)))
        column = jnp.zeros_like(v).at[:, :, -1].set(1)
        return Factors(jnp.stack([u, of_bias], 3), jnp.stack([v, column], 2), None)

    def of_unit(
        self,
        u: Float[Array, "n s t o"],
        v: Float[Array, "n s t i"],
        factor: Float[Array, "o i"] | None,
        keys: UInt32[Array, "2 2"] | None,
    ) -> Float[Array, "n *s d"]:
        """Rows of one head, or of a module that isn't split.

        Args:
            u: One head's entry of `Factors.u`.
            v: `Factors.v`, which all heads share.
            factor: The head's entry of `Factors.factor`, if there is one.
            keys: Those of its left and its right matrix; None without a projection.

        Returns:
            [document, d], or [document, position, d] with `tokens`.
        """
        if self.projection is None or keys is None:
            rows = _outer(u, v, tokens=self.tokens)
            if factor is not None:
                rows *= factor.reshape((1,) * (rows.ndim - 2) + factor.shape)
            return rows.reshape(*rows.shape[:-2], -1)
        left, right = self.projection.matrices(keys, (u.shape[-1], v.shape[-1]), self.dtype)
        if factor is None:
            rows = _outer(u @ left.T, v @ right.T, tokens=self.tokens)
        elif self.tokens:
            n, s = u.shape[:2]
            rows = lax.map(
                lambda uv: jnp.einsum("po,to,oi,ti,qi->pq", left, uv[0], factor, uv[1], right),
                (u.reshape(n * s, *u.shape[2:]), v.reshape(n * s, *v.shape[2:])),
                batch_size=TOKENS_AT_ONCE,
            ).reshape(n, s, self.projection.dimension, -1)
        else:
            # One document at a time: [out, in] is the largest array there is.
            rows = lax.map(
                lambda uv: left @ (jnp.einsum("sto,sti->oi", *uv) * factor) @ right.T, (u, v)
            )
        return rows.reshape(*rows.shape[:-2], -1)

    def global_share(
        self,
        u: Float[Array, "n s t o"],
        v: Float[Array, "n s t i"],
        factor: Float[Array, "o i"] | None,
        keys: UInt32[Array, "blocks 2"],
    ) -> Float[Array, "n *s p"]:
        """What one head, or module, adds to the rows of the global target.

        Args:
            u: One head's entry of `Factors.u`.
            v: `Factors.v`, which all heads share.
            factor: The head's entry of `Factors.factor`, if there is one.
            keys: Those of its blocks of the global matrix.

        Returns:
            [document, p], or [document, position, p] with `tokens`.
        """
        assert self.projection is not None
        return project_global(self.projection, keys, u, v, factor=factor, tokens=self.tokens)

    def unit_keys(
        self, site: Site, operands: Mapping[str, Any], context: Context, count: int
    ) -> UInt32[Array, "h k 2"] | None:
        """A site's keys by head.

        Args:
            site: The linear.
            operands: Its `keys`, sharded by rows.
            context: Mesh.
            count: How many keys each head has.

        Returns:
            [head, key, 2]; None without a projection.
        """
        if self.projection is None:
            return None
        heads = self.head_count(site)
        return context.gather_rows(operands["keys"], heads * count).reshape(heads, count, 2)

    def _normalizer(
        self, site: Site, operands: Mapping[str, Any], context: Context
    ) -> Normalizer | None:
        """The site's normalizer, gathered, with a leading axis of heads."""
        normalizer = operands.get("normalizer")
        if normalizer is None:
            return None
        heads = self.head_count(site)

        def outputs(x: Array | np.ndarray) -> Array:
            whole = context.gather_rows(jnp.asarray(x), site.out_features)
            return whole.reshape(heads, -1, *whole.shape[1:])

        bias = normalizer.bias_avg_sq
        bias = None if bias is None else outputs(bias)
        if isinstance(normalizer, AdamNormalizer):
            return AdamNormalizer(outputs(normalizer.weight_avg_sq), bias)
        columns = context.gather_rows(normalizer.col, site.in_features)
        columns = jnp.broadcast_to(columns[None], (heads, *columns.shape))
        return AdafactorNormalizer(outputs(normalizer.row), columns, bias)


def _outer(
    u: Float[Array, "n s t o"], v: Float[Array, "n s t i"], *, tokens: bool
) -> Float[Array, "n *s o i"]:
    """Σ u vᵀ over terms, and with `tokens` for each position, otherwise over positions too."""
    return jnp.einsum("nsto,nsti->nsoi" if tokens else "nsto,nsti->noi", u, v)
