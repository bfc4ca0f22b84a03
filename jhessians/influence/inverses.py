"""Inverses of Hessians on disk, one module at a time, as they act on rows of a gradient store.

Of Kronecker factors: V → Q_S (multiplier ∘ Q_Sᵀ V Q_A) Q_Aᵀ for V [out, in]. Of a dense matrix of
rows: r → r P with P = Q diag(multiplier) Qᵀ. Multipliers are made in float64, and the products in
the number format that is asked for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jhessians.errors import CheckpointError
from jhessians.influence.curvature import corrects
from jhessians.influence.inversion import Inverse, dense_inverse, wide_multiplier
from jhessians.interop.load import FactorStore
from jhessians.interop.processor_files import open_hessians
from jhessians.linalg.inverse import in_eigenbasis, out_of_eigenbasis
from jhessians.typing import Array

JOINT = "joint"
"""bergson's name for the only Hessian of all modules together."""

Apply = Callable[[Array], Array]
"""Rows [row, column] → rows of the same shape, on the device."""


class StoredInverse(Protocol):
    """An inverse on disk.

    Attributes:
        sizes: Module → the length of its rows; of a joint one, `JOINT` alone.
        corrected: Whether eigenvalues are the corrected ones.
    """

    sizes: dict[str, int]
    corrected: bool

    def of(self, module: str) -> Apply:
        """A module's inverse, read now."""
        ...


class FactoredInverse:
    """That of a Hessian of Kronecker factors, in any number of shards.

    Args:
        root: The run's folder.
        inverse: How to invert.
        dtype: Number format of the products.

    Attributes:
        sizes: Module → out · in.
        corrected: Whether eigenvalues are the corrected ones.

    Raises:
        CheckpointError: If there are no such factors, or not those that the inversion needs.
    """

    def __init__(self, root: str | Path, inverse: Inverse, dtype: np.dtype):
        self._source, self._inverse, self._dtype = FactorStore(root), inverse, dtype
        if self._source.layout == "influence_results":
            raise CheckpointError(
                f"{root} holds factors of the older tree, influence_results, whose eigenvalues "
                "have another unit; expected bergson's tree: fit it with `layout` both or bergson"
            )
        self.corrected = corrects(self._source, inverse)
        self._kind = "eigenvalue_correction" if self.corrected else "eigenvalue"
        needed = ["gradient_eigenvectors", "activation_eigenvectors", self._kind]
        if inverse.inversion == "factored_tikhonov":
            needed += ["gradient_eigenvalues", "activation_eigenvalues"]
        if missing := [kind for kind in needed if kind not in self._source.kinds]:
            raise CheckpointError(
                f"{root} has no {' and no '.join(missing)}; expected a finished run's folder: fit "
                "it again"
            )
        shapes = [self._source.shapes(kind) for kind in needed[:2]]
        self.sizes = {
            name: shapes[0][name][0] * shapes[1][name][0] for name in self._source.modules
        }

    def of(self, module: str) -> Apply:
        """A module's inverse.

        Returns:
            A function of rows.

        Raises:
            CheckpointError: If a file is damaged.
            NumericsError: If an eigenvalue of zero isn't damped, or one isn't finite.
        """
        q_s, q_a = (
            self._read(f"{side}_eigenvectors", module) for side in ("gradient", "activation")
        )
        eigenvalues = self._read(self._kind, module)
        own: dict[str, np.ndarray] = {}
        if self._inverse.inversion == "factored_tikhonov":
            own = {f"{side}_eigenvalues": self._read(f"{side}_eigenvalues", module)
                   for side in ("gradient", "activation")}  # fmt: skip
        multiplier = wide_multiplier(module, eigenvalues, self._inverse, own=own)
        arrays = [jnp.asarray(x.astype(self._dtype)) for x in (q_s, q_a, multiplier)]
        return lambda rows: _apply_factors(rows, *arrays)

    def _read(self, kind: str, module: str) -> np.ndarray:
        return np.asarray(self._source.read(kind, module)).astype(np.float64)


class DenseInverse:
    """That of an autocorrelation Hessian: of modules, of heads, or a joint one.

    Args:
        root: The folder of the gradient processor.
        inverse: How to invert; `factored_tikhonov` is `damped_inverse` here, as in bergson.
        dtype: Number format of the products.

    Attributes:
        sizes: Name → the length of its rows.
        corrected: False: there is no such thing.

    Raises:
        CheckpointError: If a file is missing or damaged, or the correction is asked for.
    """

    def __init__(self, root: str | Path, inverse: Inverse, dtype: np.dtype):
        if inverse.ev_correction:
            raise CheckpointError(
                f"`ev_correction` is asked for, but {root} holds an autocorrelation Hessian, which "
                "has no corrected eigenvalues; leave it out"
            )
        self._hessians, _ = open_hessians(Path(root))
        if not self._hessians:
            raise CheckpointError(
                f"{root} holds no Hessian; expected one of factors, or an autocorrelation Hessian"
            )
        self._inverse, self._dtype, self.corrected = inverse, dtype, False
        self.sizes = {name: int(x.shape[0]) for name, x in self._hessians.items()}
        if JOINT in self.sizes:  # bergson looks at no other then
            self.sizes = {JOINT: self.sizes[JOINT]}

    def of(self, module: str) -> Apply:
        """A module's inverse.

        Returns:
            A function of rows.

        Raises:
            CheckpointError: If a file is damaged.
            NumericsError: If an eigenvalue of zero isn't damped, or the Hessian isn't finite.
        """
        matrix = np.asarray(self._hessians[module].read())
        inverse = jnp.asarray(dense_inverse(module, matrix, self._inverse).astype(self._dtype))
        return lambda rows: _apply_matrix(rows, inverse)


def open_inverse(root: str | Path, inverse: Inverse, dtype: np.dtype) -> StoredInverse:
    """The inverse of whichever Hessian a folder holds.

    Args:
        root: A run's folder, of ours or of bergson's.
        inverse: How to invert.
        dtype: Number format of the products.

    Returns:
        It; nothing large is read yet.

    Raises:
        CheckpointError: If there is no Hessian, or not one that can be inverted as asked.
    """
    root = Path(root)
    if not root.is_dir():
        raise CheckpointError(f"{root} is no folder; expected that of a Hessian")
    dense = (root / "hessians.pth").exists() or (root / "preconditioners.pth").exists()
    factored = next(root.glob("*_sharded"), None) or (root / "influence_results").is_dir()
    # A run of factors has an empty table of dense Hessians beside it, for older readers.
    if dense and not factored:
        return DenseInverse(root, inverse, dtype)
    if factored or root.name == "influence_results":
        return FactoredInverse(root, inverse, dtype)
    raise CheckpointError(
        f"{root} holds no Hessian; expected the folder of a finished run, with "
        "eigen_gradient_sharded or hessians.pth: give another"
    )


@jax.jit
def _apply_factors(
    rows: Float[Array, "n d"],
    q_s: Float[Array, "o o"],
    q_a: Float[Array, "i i"],
    multiplier: Float[Array, "o i"],
) -> Float[Array, "n d"]:
    with jax.default_matmul_precision("highest"):
        gradients = rows.reshape(len(rows), *multiplier.shape)
        scaled = in_eigenbasis(gradients, q_s, q_a) * multiplier[None]
        return out_of_eigenbasis(scaled, q_s, q_a).reshape(rows.shape)


@jax.jit
def _apply_matrix(rows: Float[Array, "n d"], inverse: Float[Array, "d d"]) -> Float[Array, "n d"]:
    with jax.default_matmul_precision("highest"):
        return rows @ inverse
