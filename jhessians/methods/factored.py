"""Kronecker-factored methods: covariances, eigendecompositions, correction, each written in turn.

Summing differs from method to method and is a fold's business; the rest is the same for all.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from jhessians.commands.compute_config import ComputeConfig
from jhessians.fitting.factors import Kinds, KindShapes, kind_shapes
from jhessians.fitting.fit import fit_stages
from jhessians.fitting.partitions import partition
from jhessians.folds.covariance import Covariance, FactorFold
from jhessians.folds.shampoo import Shampoo
from jhessians.folds.tkfac import TraceCovariance
from jhessians.interop.export import write_kind, write_totals
from jhessians.methods.run import Run

FACTOR_FOLDS: dict[str, Callable[[ComputeConfig, np.dtype], FactorFold]] = {
    "kfac": lambda config, dtype: Covariance(dtype),
    "tkfac": lambda config, dtype: TraceCovariance(dtype, config.normalize_trace),
    "shampoo": lambda config, dtype: Shampoo(dtype),
}


def fit_run(run: Run) -> None:
    """All stages, each exported before the next one needs its memory.

    Raises:
        NumericsError: If a loss or a covariance isn't finite.
        OutputError: If the disk is full, read-only or not ours.
        ConfigError: If there are fewer modules than partitions.
    """
    config = run.config
    groups = partition(run.problem.sites, config.module_partitions)
    shapes = kind_shapes(run.problem.sites) if len(groups) > 1 else {}
    for number, sites in enumerate(groups, start=1):
        if len(groups) > 1:
            modules = sum(len(site.slots) for site in sites.values())
            run.progress.note(f"Partition {number} of {len(groups)}: {modules} modules")
        stages = fit_stages(
            replace(run.problem, sites=sites),
            run.batches,
            positions=run.documents.positions,
            documents=len(run.documents),
            method=FACTOR_FOLDS[config.bergson_method](config, run.dtype),
            correct_eigenvalues=config.corrects_eigenvalues,
            dtype=run.dtype,
            progress=run.progress,
        )
        for kinds in stages:
            _export(run, kinds, shapes, fresh=number == 1, last=number == len(groups))
    write_totals(
        run.part,
        layout=config.layout,
        total_processed=run.documents.positions,
        corrected=config.corrects_eigenvalues,
        include_bias=config.include_bias,
    )


def _export(run: Run, kinds: Kinds, shapes: KindShapes, *, fresh: bool, last: bool) -> None:
    total = sum(len(tensors) for tensors in kinds.values())
    with run.progress.stage("Export", total, "tensors") as stage:
        for kind, tensors in kinds.items():
            write_kind(
                run.part,
                kind,
                tensors,
                layout=run.config.layout,
                shards=run.shards,
                dtype=run.config.hessian_dtype,
                n_docs=len(run.documents),
                total_processed=run.documents.positions,
                among=shapes.get(kind),
                fresh=fresh,
                last=last,
            )
            stage.advance(len(tensors))
