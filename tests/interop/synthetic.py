"""A small factored Hessian with uneven dimensions, and short ways to write it."""

import numpy as np

from jhessians.interop.export import ArrayRows, Destination
from jhessians.interop.layout import KINDS

SIZES = {"layers.1.down": (120, 321), "layers.0.up": (321, 120), "tiny": (3, 5)}
N_DOCS, TOTAL = 7, 100


def make_factors(dtype=np.float32, sizes=SIZES):
    """Every kind for every module: random orthogonal vectors, positive values."""
    random = np.random.default_rng(0)
    factors = {kind: {} for kind in KINDS}
    for module, (o, i) in sizes.items():
        values = {}
        for side, d in (("activation", i), ("gradient", o)):
            root = random.standard_normal((d, d))
            values[f"{side}_covariance"] = root @ root.T
            values[f"{side}_eigenvectors"] = np.linalg.qr(root)[0]
            values[f"{side}_eigenvalues"] = random.random(d) + 0.1
        values["eigenvalue"] = np.outer(
            values["gradient_eigenvalues"], values["activation_eigenvalues"]
        )
        values["eigenvalue_correction"] = random.random((o, i)) + 0.1
        for kind, value in values.items():
            factors[kind][module] = value.astype(dtype)
    return factors


def sources(factors):
    return {
        kind: {module: ArrayRows(value) for module, value in tensors.items()}
        for kind, tensors in factors.items()
    }


def export(root, factors, *, layout="both", shards=3, dtype="fp32"):
    destination = Destination(
        root, documents=N_DOCS, total_processed=TOTAL, layout=layout, shards=shards, dtype=dtype
    )
    destination.write_factors(sources(factors))


def files_in(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
