"""Curvature of large language models in JAX.

The command `python -m jhessians compute` is a thin layer over the functions exported here, which
a research script can call inside its own `jax.jit` and mesh.
"""

import importlib
from typing import Any

from jhessians.version import __version__

# By the module that has them. They are imported when they are used: `--help` must not wait for JAX.
_MODULES = {
    "capture.coverage": ("Coverage", "Sites"),
    "capture.fold": ("Context", "Fold", "JointFold"),
    "capture.problem": ("Problem",),
    "capture.site": ("Site",),
    "capture.sites": ("find_sites",),
    "capture.documents": ("DocumentFold",),
    "commands.evaluate.bank": ("Experiment", "open_experiment"),
    "capture.traversal": ("accumulate", "initialize"),
    "capture.unpacking": ("PackedFold", "unpack"),
    "data.batching": ("Batch", "BatchPlan", "iterate_batches", "plan_batches"),
    "data.documents": ("Documents",),
    "data.sources": ("DataOptions", "load_documents"),
    "devices.compiling": ("compiled",),
    "devices.mesh": ("make_mesh", "mark_sharded"),
    "devices.topology": ("topology_devices",),
    "errors": (
        "CheckpointError", "ConfigError", "DatasetError", "FoldError", "MeshError",
        "NumericsError", "OutputError", "UserError",
    ),
    "evaluation.bank": ("Bank",),
    "evaluation.measures": ("linear_datamodeling_scores", "mean_interval", "retrieval"),
    "evaluation.training": ("Recipe", "Training", "document_losses", "shuffled"),
    "fitting.autocorrelation": ("row_operands",),
    "fitting.documents": ("map_documents",),
    "fitting.eigenbases": ("eigenvector_shapes",),
    "fitting.fit": ("fit",),
    "fitting.passes": ("Pass", "run_pass"),
    "folds.correction": ("EigenvalueCorrection",),
    "folds.covariance": ("Covariance", "FactorFold"),
    "folds.documents": ("DocumentGradients", "DocumentSquaredNorms"),
    "folds.gram": ("Gram", "JointGram"),
    "folds.normalizers": ("AdafactorNormalizer", "AdamNormalizer"),
    "folds.reduced": ("ReducedCovariance",),
    "folds.rows": ("GradientRows",),
    "folds.second_moment": ("SecondMoment",),
    "folds.shampoo": ("Shampoo",),
    "folds.tkfac": ("TKFAC",),
    "influence.curvature": ("Inverse",),
    "influence.descent": ("Descent", "Drawn", "refine_by_sgd"),
    "influence.equations": ("Refined",),
    "influence.factors": ("Factors", "load_factors", "precondition_by_factors"),
    "influence.gauss_newton": ("add_gauss_newton_product", "gauss_newton_product"),
    "influence.refinement": ("refine",),
    "influence.scoring": ("document_gradients", "score", "self_influence"),
    "interop.gradient_store": ("GradientStore",),
    "interop.low_rank_store": ("LowRankStore",),
    "interop.processor": ("GradientProcessor",),
    "linalg.inverse": ("inverse_vector_product",),
    "linalg.projection": ("Projection",),
    "models.config": ("DecoderConfig", "RopeConfig"),
    "models.decoder": ("Decoder",),
    "models.layers": ("Linear", "Stack"),
    "models.loss": ("NextTokenLoss",),
}  # fmt: skip
_HOMES = {name: f"jhessians.{module}" for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jhessians' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
