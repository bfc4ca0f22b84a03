"""One run's inputs, as the methods see them: options, model, documents, and where to write."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from jhessians.capture.problem import Problem
from jhessians.commands.compute_config import ComputeConfig
from jhessians.data.batching import Batch, BatchPlan
from jhessians.data.documents import Documents
from jhessians.interop.layout import DTYPES
from jhessians.interop.optimizer_state import Parameter
from jhessians.report.progress import Progress


@dataclass(frozen=True)
class Run:
    """What a method works with.

    Attributes:
        config: The options.
        progress: Where stages report.
        part: The folder to write into.
        mesh: All devices.
        model_name, dataset_name: The demo's too.
        documents: The data set.
        plan: How it is divided into batches.
        batches: This host's rows of every batch, to iterate as often as there are passes.
        longest: Tokens that the model's positions allow.
        parameters: Lists the parameters of torch's model, as its optimizer numbers them.
        problem: Loss, model and the linears to record.
    """

    config: ComputeConfig
    progress: Progress
    part: Path
    mesh: Mesh
    model_name: str
    dataset_name: str
    documents: Documents
    plan: BatchPlan
    batches: Iterable[Batch]
    longest: int
    parameters: Callable[[], Sequence[Parameter]]
    problem: Problem

    @property
    def shards(self) -> int:
        """Files per factor."""
        return self.config.num_shards or self.mesh.size

    @property
    def dtype(self) -> np.dtype:
        """In which to sum."""
        return sum_dtype(self.config)


def sum_dtype(config: ComputeConfig) -> np.dtype:
    """Wide enough, even where results are stored in 16 bits."""
    return np.promote_types(np.float32, DTYPES[config.hessian_dtype][1])
