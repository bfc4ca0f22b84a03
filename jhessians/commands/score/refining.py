"""Queries through the inverse of the Gauss-Newton Hessian itself, from what the factors give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from jhessians.commands.score.config import ScoreConfig
from jhessians.commands.score.refinement_options import CG, SGD
from jhessians.data.batches import Batches
from jhessians.data.batching import plan_batches
from jhessians.data.documents import Documents
from jhessians.data.drawing import Draws, permutation
from jhessians.data.selecting import select
from jhessians.errors import CheckpointError, ConfigError
from jhessians.influence.curvature import FactorSource, corrects, require_factors
from jhessians.influence.descent import Descent, Drawn, refine_by_sgd
from jhessians.influence.equations import Refined
from jhessians.influence.factors import Factors, load_factors
from jhessians.influence.gauss_newton import GaussNewtonPass, Vectors
from jhessians.influence.inversion import Inverse
from jhessians.influence.metric import Metric, WholeGradients
from jhessians.influence.queries import QueryGroup, truncated
from jhessians.influence.query_matrices import matrices_of, operands_of
from jhessians.influence.refinement import refine

ARRAYS = 8
"""As large as all queries of a group, that a solver holds."""

STEPS = {CG: 20, SGD: 200}
"""At most, where nothing is said."""

DOCUMENTS = {CG: 256, SGD: 16}
"""Of the one set, or of each step, where nothing is said."""


Solve = Callable[[GaussNewtonPass, Vectors, Callable[[int], None]], Refined]
"""Solves for some queries, and tells of each step."""


class Refiner:
    """Refines groups of queries, all with the same documents.

    Args:
        metric: Plain inner products, for which the groups are made.
        solve: The solver.
        steps: That it takes at most.
        tolerance: Of a residual.
        rank: How many outer products are kept of each refined query and linear; None for all.
    """

    def __init__(
        self, metric: WholeGradients, solve: Solve, steps: int, tolerance: float, rank: int | None
    ):
        self.metric, self.steps, self.tolerance = metric, steps, tolerance
        self._solve, self._rank = solve, rank

    def refine(
        self, group: QueryGroup, advance: Callable[[int], None]
    ) -> tuple[QueryGroup, Refined]:
        """A group's solutions as a group.

        Args:
            group: Gradients of queries.
            advance: Called after each step.

        Returns:
            The group, and how good it is.
        """
        queries = matrices_of(self.metric, group.operands)
        found = self._solve(self._products, queries, advance)
        operands, kept = operands_of(self.metric, found.solutions), group.kept
        if self._rank is not None:
            operands, kept = truncated(self.metric, operands, self._rank)
        return replace(group, operands=operands, kept=kept), found

    @cached_property
    def _products(self) -> GaussNewtonPass:
        """Compiled once for all groups."""
        return GaussNewtonPass(self.metric.problem)


def refiner(
    config: ScoreConfig,
    metric: Metric,
    source: object,
    path: str,
    documents: Documents,
    *,
    token_batch_size: int,
    positions: int,
    devices: int,
) -> Refiner:
    """What refines the queries of a run.

    Args:
        config: The options.
        metric: Plain inner products.
        source: The Hessian, opened.
        path: Its folder.
        documents: The training data.
        token_batch_size: Tokens that a device takes at once.
        positions: That the model has.
        devices: Over how many the documents of a batch are divided.

    Returns:
        A refiner with documents drawn from the data, the same for the same number of them.

    Raises:
        CheckpointError: If the Hessian has no Kronecker factors, or those of other linears.
        ConfigError: If none of the documents has a token to predict.
    """
    assert isinstance(metric, WholeGradients)
    if not isinstance(source, FactorSource):
        raise CheckpointError(
            f"{path} has no Kronecker factors, from which `refine` starts; expected a run of "
            "another method than autocorrelation"
        )
    inverse = Inverse(config.inversion, config.damping_factor, config.ev_correction)  # type: ignore[arg-type]
    kind = "eigenvalue_correction" if corrects(source, inverse) else "eigenvalue"
    require_factors(metric.problem.sites, source, (kind,))
    kinds = ("activation_eigenvectors", "gradient_eigenvectors", kind)
    factors = load_factors(Path(path), kinds=kinds, inverse=inverse, mesh=metric.problem.mesh)
    order = permutation(len(documents), config.refine_seed)
    packing = {"token_batch_size": token_batch_size, "devices": devices}
    solving = _gradients if config.refine == CG else _descent
    steps = config.refine_steps or STEPS[config.refine]
    solve = solving(config, documents, order, factors, packing, positions, steps)
    return Refiner(metric, solve, steps, config.refine_tolerance, config.query_rank)


def _gradients(
    config: ScoreConfig,
    documents: Documents,
    order: np.ndarray,
    factors: Factors,
    packing: dict[str, int],
    positions: int,
    steps: int,
) -> Solve:
    """Conjugate gradients; the first documents of an order are those of all steps."""
    count = min(config.refine_documents or DOCUMENTS[CG], len(documents))
    batches = _chosen(documents, order[:count], "refine_documents", packing, positions)

    def solve(
        products: GaussNewtonPass, queries: Vectors, advance: Callable[[int], None]
    ) -> Refined:
        return refine(
            products, batches, queries, factors, documents=count, steps=steps,
            tolerance=config.refine_tolerance, advance=advance,
        )  # fmt: skip

    return solve


def _descent(
    config: ScoreConfig,
    documents: Documents,
    order: np.ndarray,
    factors: Factors,
    packing: dict[str, int],
    positions: int,
    steps: int,
) -> Solve:
    """Gradient descent; the first documents of an order are held, steps draw of the others."""
    if len(documents) < 2:
        raise ConfigError(
            "`refine` sgd measures on other documents than it takes steps on, but there is only "
            "one; expected two or more"
        )
    held = min(config.refine_held_documents, len(documents) // 2)
    batches = _chosen(documents, order[:held], "refine_held_documents", packing, positions)
    count = min(config.refine_documents or DOCUMENTS[SGD], len(documents) - held)
    draws = Draws(
        documents, order[held:], count, config.refine_seed, max_length=positions, **packing
    )
    descent = Descent(
        config.refine_lr, config.refine_momentum, config.refine_lr_decay,
        config.refine_lr_decay_interval, config.refine_measure_interval,
    )  # fmt: skip

    def solve(
        products: GaussNewtonPass, queries: Vectors, advance: Callable[[int], None]
    ) -> Refined:
        return refine_by_sgd(
            products, lambda step: Drawn(draws.batches(step), count), batches, queries, factors,
            held_documents=held, steps=steps, tolerance=config.refine_tolerance, descent=descent,
            advance=advance,
        )  # fmt: skip

    return solve


def _chosen(
    documents: Documents, numbers: np.ndarray, name: str, packing: dict[str, int], positions: int
) -> Batches:
    chosen = select(documents, np.sort(numbers))
    if not (chosen.lengths > 1).any():
        raise ConfigError(
            f"none of the {len(numbers)} documents of `{name}` has two tokens; give more"
        )
    return Batches(chosen, plan_batches(chosen.lengths, max_length=positions, **packing))
