"""Kronecker factors of KFAC: A = Σ a aᵀ and S = Σ g gᵀ over the positions that count.

Martens & Grosse 2015, arXiv:1503.05671; for transformers Eschenhagen et al. 2023,
arXiv:2311.00636 (their "expand" setting); equations 18 and 19 of arXiv:2308.03296.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jhessians.linalg.symmetric import packed_gram, packed_shapes
from jhessians.tape import Context, Site
from jhessians.typing import Array, Float, PyTree


@dataclass(frozen=True)
class Covariance:
    """Sums of outer products, packed (`jhessians.linalg.symmetric`).

    Attributes:
        dtype: In which to accumulate.
    """

    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        def packed(d: int) -> tuple[jax.ShapeDtypeStruct, ...]:
            return tuple(jax.ShapeDtypeStruct(shape, self.dtype) for shape in packed_shapes(d))

        shapes = {"gradient": packed(site.out_features)}
        # Linears that read the same array have the same A; only the first of them keeps it.
        return {"activation": packed(site.inputs), **shapes} if site.owns_input else shapes

    def term(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        term = {"gradient": self._gram(masked(g, context), context)}
        if site.owns_input:
            term["activation"] = self._gram(masked(with_ones(a, site), context), context)
        return term

    def _gram(self, x: Float[Array, "n s d"], context: Context) -> tuple[Array, ...]:
        rows = x.reshape(-1, x.shape[-1])
        return packed_gram(rows, multiple=context.shards, dtype=self.dtype)


def with_ones(a: Float[Array, "n s i"], site: Site) -> Float[Array, "n s j"]:
    """`a` with the column of ones that stands for the bias, where the site counts it."""
    if not site.ones:
        return a
    return jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1), a.dtype)], axis=-1)


def masked(x: Float[Array, "n s d"], context: Context) -> Float[Array, "n s d"]:
    """`x` with zeros at the positions that do not count."""
    return x if context.mask is None else jnp.where(context.mask[:, :, None], x, 0)
