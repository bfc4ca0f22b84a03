"""Documents' gradients as a few outer products each: the best approximation of that rank there is.

G = Σ u vᵀ over the terms of a document, [out, in], is never formed. Its terms are as many as its
positions, so G has at most that rank, and a truncated singular value decomposition of it follows
exactly from two QRs and a small matrix (`jhessians.linalg.low_rank.truncate_sum`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.capture.fold import Context
from jhessians.capture.site import Site
from jhessians.errors import ConfigError
from jhessians.folds.rows import GradientRows
from jhessians.linalg.low_rank import truncate_sum
from jhessians.typing import Array, Float, PyTree


@dataclass(frozen=True)
class LowRankRows:
    """Each document's gradient as `rank` outer products of vectors [out] and [in].

    Attributes:
        rows: Scales the gradients, of documents and without a projection; a site's operands are
            those that it asks for, with no dense normalizer among them.
        rank: How many outer products are kept.
    """

    rows: GradientRows
    rank: int

    def document_shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """See `DocumentFold.document_shapes`.

        Args:
            site: The linear.

        Returns:
            Of each head, or of the module as the only one: `g` [rank, out] and `a` [rank, in],
            whose products add up to about G; `square`, the sum of G's squares, and `kept`, that of
            what is kept of it.
        """
        heads = self.rows.head_count(site)
        shapes: dict[str, tuple[int, ...]] = {
            "g": (heads, self.rank, site.out_features // heads),
            "a": (heads, self.rank, site.inputs),
            "square": (heads,),
            "kept": (heads,),
        }
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
        u, v, factor = self.rows.factors(site, a, g, operands, context)
        if factor is not None:
            raise ConfigError(
                "a dense normalizer scales every entry of a gradient, which is then no sum of few "
                "outer products; expected one of rank one, or none"
            )
        u = jnp.moveaxis(u, 0, 1)  # [document, head, position, term, out]

        def of_document(document: tuple[Array, Array]) -> PyTree[Array]:
            u_hsto, v_sti = document
            v_ti = v_sti.reshape(-1, v_sti.shape[-1])

            def of_head(u_sto: Array) -> PyTree[Array]:
                kept = truncate_sum(u_sto.reshape(-1, u_sto.shape[-1]), v_ti, self.rank)
                return dict(zip(("g", "a", "square", "kept"), kept, strict=True))

            return jax.vmap(of_head)(u_hsto)

        return lax.map(of_document, (u, v))
