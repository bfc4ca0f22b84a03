"""Second moments of the documents' gradients, from which normalizers are made.

v = Σ_n G_n² / n_docs, elementwise, where G_n = Σ g aᵀ over the positions of document n that count.
That is the mean square of one document's gradient. The document's loss is reduced as the loss says
(by default summed over labelled positions), and documents too short to have a gradient count as
zeros. An optimizer's own `exp_avg_sq` is a moving average of the squared gradient of a batch's mean
loss; it differs from v by one factor for all weights, and by noise.

Adafactor keeps only the means of v over inputs, r [out], and over outputs, c [in].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jhessians.capture.fold import Context
from jhessians.capture.site import Site, Statistics
from jhessians.devices.hosts import fetch
from jhessians.errors import CheckpointError
from jhessians.folds.covariance import masked, with_ones
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer, Normalizer
from jhessians.typing import Array, DTypeLike, Float, PyTree


@dataclass(frozen=True)
class SecondMoment:
    """Sums over documents of squared gradients.

    Attributes:
        factored: Whether to keep means over rows and over columns, as Adafactor does, instead of
            one sum per weight.
        dtype: Number format of the products and the running sums.
    """

    factored: bool = False
    dtype: DTypeLike = jnp.float32

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """See `Fold.shapes`.

        Args:
            site: The linear.

        Returns:
            `weight` [O, I], or where `factored` its means `row` [O] and `col` [I]; `bias` [O] where
            the bias counts.
        """
        o, i = site.out_features, site.in_features
        shapes: dict[str, tuple[int, ...]] = (
            {"row": (o,), "col": (i,)} if self.factored else {"weight": (o, i)}
        )
        if site.ones:
            shapes["bias"] = (o,)
        return {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in shapes.items()}

    def term(
        self,
        site: Site,
        a: Float[Array, "n s i"],
        g: Float[Array, "n s o"],
        operands: Mapping[str, Any],
        context: Context,
    ) -> PyTree[Array]:
        """Σ_n G_n² of these documents, or means of it; see `Fold.term`."""
        a = with_ones(a, site).astype(self.dtype)
        g = masked(g, context).astype(self.dtype)  # a need not be masked as well

        # A scan over documents: no array of all documents' gradients ever exists.
        def add(total: PyTree[Array], document: tuple[Array, Array]) -> tuple[PyTree[Array], None]:
            a_si, g_so = document
            squares = jnp.square(g_so.T @ a_si)
            return jax.tree.map(jnp.add, total, self._kept(site, squares)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shapes(site))
        return lax.scan(add, zeros, (a, g))[0]

    def _kept(self, site: Site, squares: Float[Array, "o j"]) -> dict[str, Array]:
        weight = squares[:, : site.in_features]
        if not self.factored:
            kept = {"weight": weight}
        else:
            kept = {"row": weight.mean(axis=1), "col": weight.mean(axis=0)}
        return kept | {"bias": squares[:, -1]} if site.ones else kept

    def finish(
        self, sites: Mapping[str, Site], statistics: Statistics, *, documents: int
    ) -> dict[str, Normalizer]:
        """Turn sums over the whole data set into normalizers.

        Args:
            sites: The linears.
            statistics: The sums; with several hosts, all of them call this.
            documents: How many documents the data set has.

        Returns:
            Module's full name → its normalizer, as numpy on the host, without padded rows.
        """
        normalizers: dict[str, Normalizer] = {}
        for module, site, slot in _modules(sites):
            means = {}
            for name, shape in self.shapes(site).items():
                sums = statistics[site.name][name]
                here = fetch(sums) if slot is None else fetch(sums[slot])
                means[name] = here[: shape.shape[0]] / here.dtype.type(documents)
            bias = means.get("bias")
            normalizers[module] = (
                AdafactorNormalizer(means["row"], means["col"], bias)
                if self.factored
                else AdamNormalizer(means["weight"], bias)
            )
        return normalizers


def stack_normalizers(
    sites: Mapping[str, Site], normalizers: Mapping[str, Normalizer]
) -> dict[str, Normalizer]:
    """Stack the modules' normalizers as the sites stack their layers, to be a fold's operands.

    Args:
        sites: The linears.
        normalizers: Module's full name → normalizer; those of other modules are ignored.

    Returns:
        Site's name → normalizer, whose arrays have a leading member axis in stacks.

    Raises:
        CheckpointError: If a module has none, one of another shape, or none for its bias where
            that counts; or if a stack's modules have different kinds.
    """
    stacked: dict[str, Normalizer] = {}
    for site in sites.values():
        entries = []
        for module in site.module_names():
            if module not in normalizers:
                known = f", as there is for {next(iter(normalizers))}" if normalizers else ""
                raise CheckpointError(
                    f"there is no normalizer for {module}; expected one for every module{known}"
                )
            _check_fits(module, site, normalizers[module])
            # Without the bias, its second moment would be an operand that nothing uses.
            entry = normalizers[module]
            entries.append(entry if site.ones else type(entry)(*_weights(entry)))
        if len({type(entry) for entry in entries}) > 1:
            raise CheckpointError(
                f"the normalizers of {site.name} are of different kinds; expected one kind"
            )
        if site.members is None:
            stacked[site.name] = entries[0]
        else:
            stacked[site.name] = jax.tree.map(lambda *x: np.stack(x), *entries)
    return stacked


def _weights(normalizer: Normalizer) -> tuple[Any, ...]:
    if isinstance(normalizer, AdamNormalizer):
        return (normalizer.weight_avg_sq,)
    return (normalizer.row, normalizer.col)


def _check_fits(module: str, site: Site, normalizer: Normalizer) -> None:
    o, i = site.out_features, site.in_features
    expected = [(o, i)] if isinstance(normalizer, AdamNormalizer) else [(o,), (i,)]
    given = [tuple(x.shape) for x in _weights(normalizer)]
    bias = normalizer.bias_avg_sq
    if site.ones and bias is None:
        raise CheckpointError(
            f"the normalizer of {module} has no second moment of the bias, which counts; read or "
            "estimate normalizers with the bias, or leave the bias out (`include_bias`)"
        )
    if site.ones and bias is not None:
        expected, given = [*expected, (o,)], [*given, tuple(bias.shape)]
    if given != expected:
        raise CheckpointError(
            f"the normalizer of {module} has the shapes {given}; expected {expected}, [out, in]"
        )


def _modules(sites: Mapping[str, Site]) -> Iterator[tuple[str, Site, int | None]]:
    """Name, site and slot of every module."""
    for site in sites.values():
        for slot, name in zip(site.slots, site.module_names(), strict=True):
            yield name, site, slot
