"""Queries through the inverse of the Gauss-Newton Hessian itself, from what the factors give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from jhessians.commands.score.config import ScoreConfig
from jhessians.data.batches import Batches
from jhessians.data.batching import plan_batches
from jhessians.data.documents import Documents
from jhessians.data.selecting import select
from jhessians.errors import CheckpointError, ConfigError
from jhessians.influence.curvature import FactorSource, corrects, require_factors
from jhessians.influence.factors import Factors, load_factors
from jhessians.influence.inversion import Inverse
from jhessians.influence.metric import Metric, WholeGradients
from jhessians.influence.queries import QueryGroup
from jhessians.influence.query_matrices import matrices_of, operands_of
from jhessians.influence.refinement import Refined, refine

ARRAYS = 8
"""As large as all queries of a group, that conjugate gradients hold."""


class Refiner:
    """Refines groups of queries, all with the same documents.

    Args:
        config: The options.
        metric: Plain inner products, for which the groups are made.
        factors: Of the Hessian that is refined.
        batches: Of the documents.
        documents: How many they are.
    """

    def __init__(
        self,
        config: ScoreConfig,
        metric: WholeGradients,
        factors: Factors,
        batches: Batches,
        documents: int,
    ):
        self.steps, self.tolerance = config.refine_steps, config.refine_tolerance
        self._metric, self._factors = metric, factors
        self._batches, self._documents = batches, documents

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
        found = refine(
            self._metric.problem, self._batches, matrices_of(self._metric, group.operands),
            self._factors, documents=self._documents, steps=self.steps, tolerance=self.tolerance,
            advance=advance,
        )  # fmt: skip
        operands = operands_of(self._metric, found.solutions)
        return replace(group, operands=operands), found


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
    count = min(config.refine_documents, len(documents))
    numbers = np.sort(np.random.default_rng(0).permutation(len(documents))[:count])
    chosen = select(documents, numbers)
    if not (chosen.lengths > 1).any():
        raise ConfigError(
            f"none of the {count} documents of `refine_documents` has two tokens; give more"
        )
    plan = plan_batches(
        chosen.lengths, token_batch_size=token_batch_size, devices=devices, max_length=positions
    )
    return Refiner(config, metric, factors, Batches(chosen, plan), count)
