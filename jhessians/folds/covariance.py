"""Kronecker factors of KFAC: A = Σ a aᵀ and S = Σ g gᵀ over the positions that count.

Martens & Grosse 2015, arXiv:1503.05671; for transformers Eschenhagen et al. 2023,
arXiv:2311.00636 (their "expand" setting); equations 18 and 19 of arXiv:2308.03296.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jhessians.capture.fold import Context, Fold
from jhessians.capture.site import Site, Statistics
from jhessians.devices.hosts import fetch
from jhessians.linalg.symmetric import packed_gram, packed_shapes, packed_trace, unpack_traced
from jhessians.typing import Array, DTypeLike, Float, Int, PyTree


@runtime_checkable
class FactorFold(Fold, Protocol):
    """A fold that sums two packed matrices for every linear: one of its inputs, one of gradients.

    A fold of this kind inherits from it, and says `shapes` and `term`.

    Attributes:
        shares_inputs: Whether linears that read the same array have the same activation matrix.
        unit: What a term of the sums stands for; eigenvalues are of means over these.
    """

    shares_inputs: bool
    unit: str = "position"

    def finish(self, sites: Mapping[str, Site], statistics: Statistics) -> Statistics:
        """Turn the sums over the whole data set into the factors.

        Args:
            sites: The linears.
            statistics: The sums of all batches, packed.

        Returns:
            The factors, packed; as a rule the sums themselves.
        """
        return statistics

    def unpacked(
        self, site: Site, own: dict[str, Any], of_input: dict[str, Any]
    ) -> dict[str, Array]:
        """Whole symmetric [I', I'] and [O, O], as `jhessians.unpack` gives them.

        Args:
            site: The linear.
            own: Its statistics, packed.
            of_input: Those of the linear that keeps its input's.

        Returns:
            `activation` and `gradient`; for experts also `terms`, how many were summed for each.
        """
        keeper = own if "activation" in own else of_input
        whole = {
            "activation": unpack_traced(keeper["activation"], site.inputs),
            "gradient": unpack_traced(own["gradient"], site.out_features),
        }
        if "terms" in own:  # two digits, of `two_digits`
            whole["terms"] = 256 * own["terms"][..., 0] + own["terms"][..., 1]
        return whole


@dataclass(frozen=True)
class Covariance(FactorFold):
    """Sums of outer products, packed (`jhessians.linalg.symmetric`).

    Attributes:
        dtype: Number format of the running sums.
    """

    dtype: DTypeLike = jnp.float32
    shares_inputs = True  # A depends on the input alone
    adds_calls = True  # sums over positions, whatever call they are of

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """Packed A, S and a count of terms, as `factor_shapes` says; see `Fold.shapes`."""
        return factor_shapes(site, self.dtype, activation=site.owns_input, terms=site.routed)

    def term(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """Σ a aᵀ and Σ g gᵀ over these documents' positions; see `Fold.term`."""
        term: dict[str, Any] = {"gradient": self._gram(g, context)}
        if site.owns_input:
            term["activation"] = self._gram(with_ones(a, site), context)
        if site.routed:
            term["terms"] = two_digits(context.mask.sum(), self.dtype)
        return term

    def _gram(self, x: Float[Array, "n s d"], context: Context) -> tuple[Array, ...]:
        counted = None if context.mask is None else context.mask.reshape(-1)
        return packed_gram(
            x.reshape(-1, x.shape[-1]), counted=counted, multiple=context.shards, dtype=self.dtype,
            filled=context.filled_share if context.tiled else None,
        )  # fmt: skip


def two_digits(count: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "2"]:
    """A count as two digits to the base 256, of which float32 can add more without rounding.

    Args:
        count: A whole number, such as the terms of one batch.
        dtype: Number format of the digits, in which they will be summed.

    Returns:
        The multiples of 256, and the rest.
    """
    return jnp.stack([count // 256, count % 256]).astype(dtype)


def routed_terms(statistics: Statistics) -> dict[str, np.ndarray]:
    """How many positions, or documents, each expert read.

    Args:
        statistics: Sums of a `FactorFold`; with several hosts, all of them call this.

    Returns:
        Site's name → counts, [member], on the host. Sites without experts are left out.
    """
    return {
        name: np.round(fetch(sums["terms"])[:, :2]).astype(np.int64) @ np.array([256, 1])
        for name, sums in statistics.items()
        if "terms" in sums
    }


def factor_shapes(
    site: Site, dtype: DTypeLike, *, activation: bool, terms: bool = False
) -> dict[str, Any]:
    """Shapes of a site's factors.

    Args:
        site: The linear.
        dtype: Number format of the sums.
        activation: Whether it keeps an activation matrix of its own.
        terms: Whether it counts its terms.

    Returns:
        Packed [O, O], packed [I', I'] and the count's two digits, as far as there are.
    """

    def packed(d: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in packed_shapes(d))

    shapes: dict[str, Any] = {"activation": packed(site.inputs)} if activation else {}
    shapes["gradient"] = packed(site.out_features)
    if terms:
        shapes["terms"] = jax.ShapeDtypeStruct((2,), dtype)
    return shapes


def divide_activation_by_trace(sites: Mapping[str, Site], statistics: Statistics) -> Statistics:
    """Divide every activation matrix by its trace.

    Args:
        sites: The linears.
        statistics: Packed factors; each linear has an activation matrix of its own.

    Returns:
        The same with activation matrices of trace 1; those that are zero stay zero.
    """

    def scaled(site: Site, factors: dict[str, Any]) -> dict[str, Any]:
        trace = packed_trace(factors["activation"], site.inputs)
        scale = jnp.where(trace > 0, 1 / jnp.where(trace > 0, trace, 1), 0)[..., None, None]
        return {**factors, "activation": tuple(x * scale for x in factors["activation"])}

    return {name: scaled(sites[name], factors) for name, factors in statistics.items()}


def with_ones(a: Float[Array, "n s i"], site: Site) -> Float[Array, "n s j"]:
    """A linear's input with the column of ones that stands for the bias.

    Args:
        a: The input.
        site: Says whether the bias counts.

    Returns:
        `a` with one more column, last; or as it is where the bias doesn't count.
    """
    if not site.ones:
        return a
    return jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1), a.dtype)], axis=-1)


def masked(x: Float[Array, "n s d"], context: Context) -> Float[Array, "n s d"]:
    """`x` with zeros at the positions that do not count."""
    return x if context.mask is None else jnp.where(context.mask[:, :, None], x, 0)
