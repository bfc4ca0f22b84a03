"""The passes of `advise`: two halves are fitted and compared, and damping factors tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jhessians.capture.problem import Activations, Problem
from jhessians.commands.advise.config import AdviseConfig
from jhessians.commands.advise.data import Part, divide, part
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import load_problem, sum_dtype
from jhessians.commands.problem import gradient_loss, read_inputs, settled_activations
from jhessians.config.units import count_in_words
from jhessians.data.batches import Batches
from jhessians.devices.hosts import together
from jhessians.devices.mesh import make_mesh
from jhessians.devices.precision import require_supported
from jhessians.fitting.documents import map_documents
from jhessians.fitting.fit import fit_stages
from jhessians.fitting.partitions import needed_partitions, partition
from jhessians.folds.documents import DocumentGradients
from jhessians.influence.curvature import require_factors
from jhessians.influence.damping import Choice, Trial, choose, try_dampings
from jhessians.influence.halves import ModuleAgreement, compare
from jhessians.interop.load import FactorStore
from jhessians.linalg.eigen import ordered_map, usable_cores
from jhessians.methods.factored import FactoredMethod
from jhessians.report.progress import Progress

KEPT = ("gradient_eigenvectors", "activation_eigenvectors", "eigenvalue", "eigenvalue_correction")
"""Kinds of the first half's factors that damping factors are tried with."""


@dataclass(frozen=True)
class Examined:
    """What the passes found.

    Attributes:
        documents: Of the whole data set.
        positions: Of the whole data set.
        half_documents: In each half.
        half_positions: In both halves, on average.
        queries: How many vectors inverses were applied to.
        held_out: How many documents judged damping factors.
        agreements: Module → how far the halves agree.
        trial: What damping factors are worth; None if none were tried.
        choice: The best of them.
    """

    documents: int
    positions: int
    half_documents: int
    half_positions: float
    queries: int
    held_out: int
    agreements: Mapping[str, ModuleAgreement]
    trial: Trial | None
    choice: Choice | None

    @property
    def share(self) -> float:
        """A half's part of all positions."""
        return self.half_positions / self.positions


def examine(config: AdviseConfig, store: FactorStore, progress: Progress) -> Examined:
    """Fit the halves, compare them, and try damping factors.

    Args:
        config: Validated.
        store: The run's factors.
        progress: Is told of stages.

    Returns:
        What was found.

    Raises:
        UserError: If model or data can't be read, or aren't those of the run.
    """
    fit = config.fit
    mesh = make_mesh(fit.world_size, axes=fit.mesh)
    require_supported(fit.matmul_precision, jax.local_devices()[0])
    inputs = read_inputs(fit, mesh, progress, token_batch_size=fit.token_batch_size)
    data, whole = inputs.batches.documents, inputs.batches
    division = divide(
        data, queries=config.held_out_queries, held_out=config.held_out_documents,
        half=config.half_documents, seed=config.halves_seed,
    )  # fmt: skip

    def batches(numbers: np.ndarray) -> Part:
        return part(
            data, numbers, token_batch_size=fit.token_batch_size, devices=mesh.size,
            positions=inputs.shape.positions,
        )  # fmt: skip

    halves = tuple(batches(numbers) for numbers in division.halves)
    queries = batches(division.queries)
    problem, _ = load_problem(fit, inputs, mesh, progress)
    with together():
        require_factors(problem.sites, store)
    problem = _with_activations(problem, fit, whole, mesh, progress)
    own = replace(problem, loss=gradient_loss(fit), draws=1)
    with progress.stage("Gradients of queries"):
        vectors = map_documents(
            DocumentGradients(), own, Batches(queries.documents, queries.plan),
            documents=len(queries.documents),
        )  # fmt: skip
    dampings = sorted({*config.tried, config.damping_factor} - {0.0})
    agreements, first = _compared(problem, fit, halves, vectors, dampings, store, progress)
    trial = None
    if len(division.held_out):
        trial = _tried(config, fit, own, batches(division.held_out), vectors, first, progress)
    return Examined(
        len(data), data.positions, len(halves[0].documents),
        sum(half.documents.positions for half in halves) / 2,
        len(queries.documents), 0 if trial is None else len(division.held_out), agreements, trial,
        None if trial is None else choose(trial.dampings, trial.gains),
    )  # fmt: skip


def _with_activations(
    problem: Problem, fit: ComputeConfig, batches: Batches, mesh: Mesh, progress: Progress
) -> Problem:
    taken = fit.chosen.statistics_bytes(
        problem.sites, fit.method_options, sum_dtype(fit), partitions=_groups(fit, problem, mesh)
    )
    choice = settled_activations(fit.activations, problem, batches, mesh, taken, progress.note)
    return replace(problem, activations=cast(Activations, choice))


def _groups(fit: ComputeConfig, problem: Problem, mesh: Mesh | None) -> int:
    if isinstance(fit.module_partitions, str):
        devices = 1 if mesh is None else mesh.size
        return needed_partitions(
            problem.sites, sum_dtype(fit).itemsize, devices, hosts=problem.hosts,
            shares_inputs=fit.chosen.shares_inputs(fit.method_options),
        )  # fmt: skip
    return fit.module_partitions


def _compared(
    problem: Problem,
    fit: ComputeConfig,
    halves: Iterable[Part],
    vectors: Mapping[str, np.ndarray],
    dampings: list[float],
    store: FactorStore,
    progress: Progress,
) -> tuple[dict[str, ModuleAgreement], dict[str, dict[str, Any]]]:
    """Module → agreement, and of the first half's factors the kinds `KEPT`."""
    agreements: dict[str, ModuleAgreement] = {}
    first: dict[str, dict[str, Any]] = {}
    for sites in partition(problem.sites, _groups(fit, problem, problem.mesh)):
        here, fitted, terms = replace(problem, sites=sites), [], []
        for number, half in enumerate(halves, start=1):
            documents = count_in_words(len(half.documents), "document")
            progress.note(f"Half {number} of 2: {documents}")
            factors, count = _fitted(here, fit, half, progress)
            fitted.append(factors)
            terms.append(count)
        names = [name for site in sites.values() for name in site.module_names()]

        def compared(
            item: tuple[str, Any], fitted: Any = tuple(fitted), terms: Any = tuple(terms)
        ) -> ModuleAgreement:
            name, whole = item
            return compare(name, fitted, terms, vectors[name], dampings, whole=whole)

        with progress.stage("Comparison", len(names), "modules") as stage:
            items = ((name, _stored(store, name)) for name in names)
            cores = usable_cores()
            found = ordered_map(compared, items, workers=cores, window=cores)
            for name, agreement in zip(names, found, strict=True):
                agreements[name] = agreement
                stage.advance()
        for kind in KEPT:
            if kind in fitted[0]:
                first.setdefault(kind, {}).update(fitted[0][kind])
    return agreements, first


def _fitted(
    problem: Problem, fit: ComputeConfig, half: Part, progress: Progress
) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """A half's factors, and how many terms they sum."""
    method = fit.chosen
    assert isinstance(method, FactoredMethod)
    fold = method.fold(fit.method_options, sum_dtype(fit))
    terms = half.terms(fold.unit)
    stages = fit_stages(
        problem, half, positions=half.documents.positions, documents=len(half.documents),
        terms=terms, method=fold, correct_eigenvalues=fit.corrects_eigenvalues,
        dtype=sum_dtype(fit), progress=progress,
    )  # fmt: skip
    found: dict[str, dict[str, np.ndarray]] = {}
    for kinds in stages:
        for kind, tensors in kinds.items():
            found[kind] = {name: rows.rows(0, rows.shape[0]) for name, rows in tensors.items()}
    return found, terms


def _stored(store: FactorStore, module: str) -> dict[str, dict[str, np.ndarray]] | None:
    """The run's own factors of a module; None where their eigenvalues are in another unit."""
    if store.layout != "bergson":
        return None
    return {kind: {module: store.read(kind, module)} for kind in KEPT if kind in store.kinds}


def _tried(
    config: AdviseConfig,
    fit: ComputeConfig,
    problem: Problem,
    held_out: Part,
    vectors: Mapping[str, np.ndarray],
    factors: dict[str, dict[str, Any]],
    progress: Progress,
) -> Trial | None:
    if fit.loss_fn == "log_odds":
        progress.note(
            "No damping factors are tried: the Gauss-Newton Hessian of log_odds isn't known"
        )
        return None
    tried = config.tried
    with progress.stage("Damping factors", len(tried), "factors") as stage:
        return try_dampings(
            problem, held_out, vectors, factors, tried, documents=len(held_out.documents),
            advance=stage.advance,
        )  # fmt: skip
