"""The exporter's view of a fit: for each kind of factor, every module's tensor by name.

Nothing is copied here. Rows are cut from stacked, packed or factored arrays when they are asked
for, and modules that share an input share its arrays.
"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Float

from jhessians.capture.site import Site, Statistics
from jhessians.fitting.eigenbases import Eigenbases, Matrix, TermCounts
from jhessians.interop.shards import BLOCK_BYTES
from jhessians.interop.tensors import ArrayRows, ScaledRows, TensorRows, no_rows
from jhessians.linalg.symmetric import unpack
from jhessians.typing import Array

Kinds = dict[str, dict[str, TensorRows]]
"""Kind of factor → module's full name → its tensor, of which rows can be asked for."""

KindShapes = dict[str, dict[str, tuple[int, ...]]]
"""Kind of factor → module's full name → the shape of its tensor."""


def covariance_tensors(sites: Mapping[str, Site], statistics: Statistics) -> Kinds:
    """A and S of every module.

    Args:
        sites: The linears.
        statistics: Packed factors, which are read when a tensor is.

    Returns:
        `activation_covariance` [I', I'] and `gradient_covariance` [O, O], sums over terms.
    """
    kinds: Kinds = {"activation_covariance": {}, "gradient_covariance": {}}
    for module, site, slot in _modules(sites):
        a = Matrix(sites[site.input_site], "activation", slot)
        s = Matrix(site, "gradient", slot)
        kinds["activation_covariance"][module] = _Covariance(a, statistics)
        kinds["gradient_covariance"][module] = _Covariance(s, statistics)
    return kinds


def eigen_tensors(
    sites: Mapping[str, Site], bases: Eigenbases, terms: TermCounts, documents: int
) -> Kinds:
    """Eigenvectors, their outer eigenvalues, and each factor's own.

    Args:
        sites: The linears.
        bases: Eigenpairs of means over terms.
        terms: How many those were.
        documents: How many documents: eigenvalues become means over these.

    Returns:
        `activation_eigenvectors` [I', I'] and `gradient_eigenvectors` [O, O], as columns;
        `activation_eigenvalues` [I'], `gradient_eigenvalues` [O] and their outer product
        `eigenvalue` [O, I'].
    """
    kinds: Kinds = {
        "activation_eigenvectors": {},
        "gradient_eigenvectors": {},
        "eigenvalue": {},
        "activation_eigenvalues": {},
        "gradient_eigenvalues": {},
    }
    for module, site, slot in _modules(sites):
        index = () if slot is None else slot
        a, s = (site.input_site, "activation", site.inputs), (site.name, "gradient",
                                                              site.out_features)  # fmt: skip
        values = {}
        per_document = terms.of(site, slot) / documents
        for name, side, d in (a, s):
            vectors = bases.vectors[name][side]
            kinds[f"{side}_eigenvectors"][module] = ArrayRows(vectors, index=index, shape=(d, d))
            values[side] = bases.values[name][side][index]
            # The scale is split evenly, so that the product of the factors' is that of the outer.
            own = ScaledRows(ArrayRows(values[side]), per_document**0.5)
            kinds[f"{side}_eigenvalues"][module] = own
        outer = _Outer(values["gradient"], values["activation"])
        kinds["eigenvalue"][module] = ScaledRows(outer, per_document)
    return kinds


def correction_tensors(sites: Mapping[str, Site], squares: Statistics, documents: int) -> Kinds:
    """Λ of every module.

    Args:
        sites: The linears.
        squares: Sums of `EigenvalueCorrection`, by site.
        documents: How many documents: Λ is a mean over these.

    Returns:
        `eigenvalue_correction` [O, I'].
    """
    tensors: dict[str, TensorRows] = {}
    for module, site, slot in _modules(sites):
        shape = (site.out_features, site.inputs)
        index = () if slot is None else slot
        rows = ArrayRows(squares[site.name], index=index, shape=shape)
        tensors[module] = ScaledRows(rows, 1 / documents)
    return {"eigenvalue_correction": tensors}


def kind_shapes(sites: Mapping[str, Site]) -> KindShapes:
    """The shapes of every module's tensors, before there are any.

    Args:
        sites: The linears.

    Returns:
        Those of every kind that the functions above return.
    """
    shapes: KindShapes = {}
    for module, site, _ in _modules(sites):
        o, i = site.out_features, site.inputs
        for side, d in (("activation", i), ("gradient", o)):
            shapes.setdefault(f"{side}_covariance", {})[module] = (d, d)
            shapes.setdefault(f"{side}_eigenvectors", {})[module] = (d, d)
            shapes.setdefault(f"{side}_eigenvalues", {})[module] = (d,)
        for kind in ("eigenvalue", "eigenvalue_correction"):
            shapes.setdefault(kind, {})[module] = (o, i)
    return shapes


def _modules(sites: Mapping[str, Site]) -> Iterator[tuple[str, Site, int | None]]:
    """Name, site and slot of every module."""
    for site in sites.values():
        for slot, name in zip(site.slots, site.module_names(), strict=True):
            yield name, site, slot


class _Covariance:
    """Rows of a packed covariance, which is unpacked once for a run of requests."""

    def __init__(self, matrix: Matrix, statistics: Statistics):
        self._matrix = matrix
        self._statistics = statistics
        self._whole: Float[np.ndarray, "d d"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self._matrix.dimension, self._matrix.dimension)

    def rows(self, start: int, stop: int, *, everywhere: bool = True) -> Float[np.ndarray, "r d"]:
        if self._whole is None:
            self._whole = self._read(everywhere)
        rows = self._whole[start:stop]
        if stop == self._matrix.dimension:
            self._whole = None  # requests come in order: these were the last rows
        return rows

    def _read(self, everywhere: bool) -> Float[np.ndarray, "d d"]:
        d = self._matrix.dimension
        if everywhere or jax.process_count() == 1:
            return self._matrix.read(self._statistics)
        blocks = map(self._on_first_host, self._matrix.stacks(self._statistics))
        if jax.process_index() == 0:
            return unpack(blocks, d)
        dtypes = {block.dtype for block in blocks}
        return no_rows((d, d), dtypes.pop())

    def _on_first_host(self, stack: Array) -> Float[np.ndarray, "r c"]:
        """A block, of which some rows at a time come to the first host; zeros on others."""
        slot = self._matrix.slot
        source = ArrayRows(stack, index=() if slot is None else slot)
        count, columns = source.shape
        first = jax.process_index() == 0
        whole = np.empty(source.shape, stack.dtype) if first else no_rows(source.shape, stack.dtype)
        step = max(1, BLOCK_BYTES // (4 * columns))
        for start in range(0, count, step):
            rows = source.rows(start, min(start + step, count), everywhere=False)
            if first:
                whole[start : start + step] = rows
        return whole


class _Outer:
    """Rows of λ_S ⊗ λ_A, never held whole."""

    def __init__(self, gradient: Float[np.ndarray, " o"], activation: Float[np.ndarray, " i"]):
        self._gradient, self._activation = gradient, activation
        self.shape = (len(gradient), len(activation))

    def rows(self, start: int, stop: int, *, everywhere: bool = True) -> Float[np.ndarray, "r i"]:
        return np.outer(self._gradient[start:stop], self._activation)
