"""Curvature of large language models in JAX.

The command `python -m jhessians compute` is a thin layer over the functions exported here, which
a research script can call inside its own `jax.jit` and mesh.
"""

import importlib
from typing import Any

from jhessians.version import __version__

# Names are imported when they are used: `--help` must not wait for JAX.
_HOMES = {
    "Linear": "jhessians.models.layers",
    "Stack": "jhessians.models.layers",
    "Decoder": "jhessians.models.decoder",
    "DecoderConfig": "jhessians.models.config",
    "NextTokenLoss": "jhessians.models.loss",
    "Batch": "jhessians.data.batching",
    "Covariance": "jhessians.folds.covariance",
    "EigenvalueCorrection": "jhessians.folds.correction",
    "Context": "jhessians.capture.fold",
    "Fold": "jhessians.capture.fold",
    "Site": "jhessians.capture.site",
    "accumulate": "jhessians.capture.traversal",
    "find_sites": "jhessians.capture.sites",
    "initialize": "jhessians.capture.traversal",
    "Problem": "jhessians.capture.problem",
    "run_pass": "jhessians.fitting.passes",
    "fit": "jhessians.fitting.fit",
    "inverse_vector_product": "jhessians.linalg.inverse",
    "load_factors": "jhessians.interop.load",
    "GradientProcessor": "jhessians.interop.processor",
    "AdamNormalizer": "jhessians.folds.normalizers",
    "AdafactorNormalizer": "jhessians.folds.normalizers",
    "make_mesh": "jhessians.devices.mesh",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jhessians' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
