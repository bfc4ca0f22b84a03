"""Kronecker-factored methods: covariances, eigendecompositions, correction, each written in turn.

What is summed differs from method to method and is a fold's business; the rest is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jhessians.fitting import arithmetic
from jhessians.methods.method import Method, PlannedPass

if TYPE_CHECKING:
    import numpy as np

    from jhessians.capture.problem import Problem
    from jhessians.capture.site import Site
    from jhessians.folds.covariance import FactorFold
    from jhessians.methods.method import Run


@dataclass(frozen=True, kw_only=True)
class FactoredMethod(Method):
    """A method that approximates each module's Hessian by the product of two factors.

    Attributes:
        fold: Makes the fold that sums the factors, from the method's own options and the number
            format of the sums.
        factor_flop: Arithmetic of these sums, a function of `jhessians.fitting.arithmetic`.
    """

    fold: Callable[[Any, np.dtype], FactorFold]
    factor_flop: Callable[..., float]
    product: ClassVar[str] = "factors"
    factored: ClassVar[bool] = True
    labels: ClassVar[Literal["sampled", "dataset"]] = "sampled"
    mean_reduction: ClassVar[Literal["mean", "mean_gradient"]] = "mean"

    def fit(self, run: Run) -> None:
        """All stages, each exported before the next one needs its memory."""
        from jhessians.fitting.factors import kind_shapes
        from jhessians.fitting.fit import fit_stages
        from jhessians.fitting.partitions import partition

        fold = self.fold(run.options, run.dtype)
        groups = partition(run.problem.sites, run.partitions)
        shapes = kind_shapes(run.problem.sites) if len(groups) > 1 else {}
        data, terms = run.batches.documents, run.batches.terms(fold.unit)
        destination = replace(run.destination, total_processed=terms)
        for number, sites in enumerate(groups, start=1):
            kept = run.kept.within(f"partition-{number}") if len(groups) > 1 else run.kept
            if kept.done:
                continue
            if len(groups) > 1:
                modules = sum(len(site.slots) for site in sites.values())
                run.progress.note(f"Partition {number} of {len(groups)}: {modules} modules")
            stages = fit_stages(
                replace(run.problem, sites=sites),
                run.batches,
                positions=data.positions,
                documents=len(data),
                terms=terms,
                method=fold,
                correct_eigenvalues=run.correct_eigenvalues,
                dtype=run.dtype,
                progress=run.progress,
                kept=kept,
            )
            for kinds in stages:
                with run.progress.stage(
                    "Export", sum(map(len, kinds.values())), "tensors"
                ) as stage:
                    for kind, tensors in kinds.items():
                        destination.write_kind(
                            kind, tensors,
                            among=shapes.get(kind), fresh=number == 1, last=number == len(groups),
                        )  # fmt: skip
                        stage.advance(len(tensors))
            if len(groups) > 1:
                kept.finish()
        destination.write_totals(corrected=run.correct_eigenvalues, include_bias=run.include_bias)

    def shares_inputs(self, options: Any) -> bool:
        """As its fold says."""
        import numpy as np

        return self.fold(options, np.dtype(np.float32)).shares_inputs

    def flop(self, work: arithmetic.Work, options: Any) -> dict[str, float]:
        """Of the passes for the factors and for the eigenvalue correction."""
        sites: Any = {each.name: each for each in work.linears}
        rotated = replace(work, linears=list(self._fitted(sites, options).values()))
        return {
            "Covariances": work.count(self.factor_flop),
            "Eigenvalue correction": rotated.count(arithmetic.correction),
        }

    def passes(
        self, problem: Problem, options: Any, dtype: np.dtype, *, correct_eigenvalues: bool
    ) -> dict[str, PlannedPass]:
        """Covariances, and if it is wanted the eigenvalue correction."""
        from jhessians.fitting.eigenbases import eigenvector_shapes
        from jhessians.folds.correction import EigenvalueCorrection

        problem = replace(problem, sites=self._fitted(problem.sites, options))
        passes = {"Covariances": PlannedPass(problem, self.fold(options, dtype), {})}
        if correct_eigenvalues:
            vectors = eigenvector_shapes(problem, dtype)
            correction = PlannedPass(problem, EigenvalueCorrection(dtype), vectors, dtype)
            passes["Eigenvalue correction"] = correction
        return passes

    def between_bytes(
        self,
        sites: Mapping[str, Site],
        options: Any,
        dtype: np.dtype,
        *,
        devices: int,
        hosts: int,
    ) -> int:
        """Of covariances that are still to be read, eigenvectors, and matrices on their way."""
        from jhessians.fitting.memory import stage_bytes

        sites = self._fitted(sites, options)
        return stage_bytes(sites.values(), dtype.itemsize, devices=devices, hosts=hosts).between

    def matrix_sizes(self, sites: Mapping[str, Site], options: Any) -> list[int]:
        """Of every distinct covariance."""
        from jhessians.fitting.eigenbases import covariance_matrices

        matrices = covariance_matrices(self._fitted(sites, options))
        return [matrix.dimension for matrix in matrices]

    def _fitted(self, sites: Mapping[str, Site], options: Any) -> Mapping[str, Site]:
        """The linears as they are fitted: with activation matrices of their own, if need be."""
        from jhessians.capture.sites import unshared

        return sites if self.shares_inputs(options) else unshared(sites)

    def result_numbers(
        self, sites: Mapping[str, Site], options: Any, *, correct_eigenvalues: bool
    ) -> int:
        """Of all kinds of factors."""
        from math import prod

        from jhessians.fitting.factors import kind_shapes

        kinds = kind_shapes(sites)
        if not correct_eigenvalues:
            del kinds["eigenvalue_correction"]
        return sum(prod(shape) for shapes in kinds.values() for shape in shapes.values())

    def statistics_bytes(
        self, sites: Mapping[str, Site], options: Any, dtype: np.dtype, *, partitions: int
    ) -> int:
        """Of the largest group's covariances, or of its eigenvectors and Λ."""
        from jhessians.fitting.partitions import factor_bytes

        return factor_bytes(
            sites, partitions, dtype.itemsize, shares_inputs=self.shares_inputs(options)
        )
