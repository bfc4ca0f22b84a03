"""The torch files in a gradient processor's folder: one table by module each, and its checks."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jhessians.errors import CheckpointError, NumericsError, quoted, shown
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer, Normalizer
from jhessians.interop import torchfile
from jhessians.interop.manifest import check_files
from jhessians.interop.torchfile import LazyTensor
from jhessians.typing import Array

NORMALIZERS_FILE = "normalizers.pth"
HESSIANS_FILE = "hessians.pth"
EIGEN_FILE = "hessians_eigen.pth"
LEGACY_NAMES = {
    HESSIANS_FILE: "preconditioners.pth",
    EIGEN_FILE: "preconditioners_eigen.pth",
}

# [d, d], and [d] with [d, d]. d differs from module to module, so it isn't in the type: `misshapen`
# checks it, and says in one line what is wrong.
Matrix = np.ndarray | Array
EigenPair = tuple[np.ndarray | Array, Matrix]


def tensor_files(skip_hessians: bool = False) -> set[str]:
    """Names of the torch files that a folder may have, with or without those of Hessians."""
    hessians = set() if skip_hessians else {*LEGACY_NAMES, *LEGACY_NAMES.values()}
    return {NORMALIZERS_FILE, *hessians}


def read_hessians(path: Path) -> tuple[dict[str, Matrix], dict[str, EigenPair]]:
    """Hessians and eigenpairs by module, under the new names or the old ones.

    Returns:
        Two tables of arrays: [d, d], and ([d], [d, d]); the second may lack what older versions
            lack.

    Raises:
        CheckpointError: If a file is missing, damaged, or holds something else.
        NumericsError: If a number isn't finite.
    """
    hessians, eigen = _hessians(path, torchfile.load)
    for name, matrix in hessians.items():
        require_finite(matrix, f"the Hessian of {name} in {path}")
    for name, pair in eigen.items():
        for part in pair:
            require_finite(part, f"the eigenpairs of {name} in {path}")
    return hessians, eigen


def open_hessians(path: Path) -> tuple[dict[str, LazyTensor], dict[str, tuple[LazyTensor, ...]]]:
    """Like `read_hessians`, but every matrix stays on the disk until it is read.

    Returns:
        The same two tables, of tensors that know their shape and dtype.

    Raises:
        CheckpointError: If a file is missing, damaged, or holds something else or wrong shapes.
    """
    check_files(path, tensor_files().__contains__)
    hessians, eigen = _hessians(path, torchfile.open_torch_file)
    if problem := misshapen({}, hessians, eigen):
        raise CheckpointError(f"{path}: {problem}; restore it or make it again")
    return hessians, eigen


def _hessians(path: Path, read: Callable[[Path], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    file = _existing(path, HESSIANS_FILE)
    hessians = _read_table(file, _is_array, "an array", read)
    # Folders of the first versions hold no eigenpairs.
    if file.name != HESSIANS_FILE and not (path / LEGACY_NAMES[EIGEN_FILE]).exists():
        return hessians, {}
    file = _existing(path, EIGEN_FILE)
    return hessians, _read_table(file, _is_pair, "eigenvalues and eigenvectors", read)


def _existing(path: Path, name: str) -> Path:
    """Path of the file under its name or its older one, whichever exists."""
    for file in (path / name, path / LEGACY_NAMES[name]):
        if file.exists():
            return file
    raise CheckpointError(
        f"{path} has neither {name} nor {LEGACY_NAMES[name]}; expected the folder of an "
        "autocorrelation Hessian: give another, or make it with bergson or jhessians"
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | LazyTensor) and (
        np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16"
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_array(x) for x in value)


def _read_table(
    file: Path,
    is_valid: Callable[[Any], bool],
    expected: str,
    read: Callable[[Path], Any] = torchfile.load,
) -> dict[str, Any]:
    """A torch file's table of module → value, with every value checked."""
    if not file.exists():
        raise CheckpointError(f"{file} does not exist; expected the folder of a gradient processor")
    table = read(file)
    if not isinstance(table, dict):
        raise CheckpointError(f"{file} holds a {type(table).__name__}; expected a dict by module")
    for name, value in table.items():
        if not isinstance(name, str) or not is_valid(value):
            raise CheckpointError(
                f"{file}: {quoted(name)} isn't a module's name with {expected}; restore it or "
                "make it again"
            )
    return dict(table)


_KINDS: dict[str, tuple[type[Normalizer], tuple[str, ...]]] = {
    "AdamNormalizer": (AdamNormalizer, ("weight_avg_sq",)),
    "AdafactorNormalizer": (AdafactorNormalizer, ("row", "col")),
}


def normalizer_state(normalizer: Normalizer) -> dict[str, Any]:
    """A normalizer as bergson stores it: the name of its class, and its tensors."""
    arrays = {each.name: getattr(normalizer, each.name) for each in dataclasses.fields(normalizer)}
    present = {name: array for name, array in arrays.items() if array is not None}
    return {"__class__": type(normalizer).__name__, **present}


def read_normalizers(path: Path) -> dict[str, Normalizer]:
    """Normalizers by module; none of them is checked against a model.

    Returns:
        Module → Adam's or Adafactor's second moments, as float arrays.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds something else.
        NumericsError: If a number isn't finite.
    """
    file = path / NORMALIZERS_FILE
    states = _read_table(file, lambda value: isinstance(value, dict), "a normalizer")
    return {name: _normalizer(file, name, state) for name, state in states.items()}


def _normalizer(file: Path, module: str, state: Mapping[str, Any]) -> Normalizer:
    arrays = dict(state)
    kind = arrays.pop("__class__", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(
            f"{file}: {shown(module)} has a normalizer of class {quoted(kind)}; expected one of "
            f"{', '.join(_KINDS)}"
        )
    if "avg_sq" in arrays:  # its name before there were biases
        arrays["weight_avg_sq"] = arrays.pop("avg_sq")
    create, required = _KINDS[kind]
    arrays = {name: array for name, array in arrays.items() if array is not None}
    fine = set(required) <= set(arrays) <= {*required, "bias_avg_sq"}
    if not fine or not all(_is_array(array) for array in arrays.values()):
        found = shown(", ".join(map(str, arrays))) or "nothing"
        raise CheckpointError(
            f"{file}: the {kind} of {shown(module)} has {found}; expected the arrays "
            f"{', '.join(required)} and perhaps bias_avg_sq"
        )
    if problem := _misshapen_normalizer(module, arrays):
        raise CheckpointError(f"{file}: {problem}; restore it or make it again")
    for array in arrays.values():
        require_finite(array, f"the normalizer of {module} in {file}")
    return create(**arrays)


def require_finite(array: np.ndarray, what: str) -> None:
    """Check that numbers from a file are finite.

    Args:
        array: The numbers.
        what: Names them.

    Raises:
        NumericsError: If one isn't.
    """
    if not np.isfinite(array).all():
        raise NumericsError(
            f"{shown(what, limit=400)} holds NaN or infinity; expected finite numbers; get a whole "
            "copy of it or make it again"
        )


def _misshapen_normalizer(name: str, arrays: Mapping[str, Any]) -> str | None:
    """What is wrong with the shapes of a normalizer's arrays, by their fields' names."""
    for field, axes in (("weight_avg_sq", 2), ("row", 1), ("col", 1)):
        if field in arrays and len(arrays[field].shape) != axes:
            return f"{field} of {name} has shape {arrays[field].shape}; expected {axes} axes"
    outputs = arrays["weight_avg_sq" if "weight_avg_sq" in arrays else "row"].shape[:1]
    bias = arrays.get("bias_avg_sq")
    if bias is not None and bias.shape != outputs:
        return f"bias_avg_sq of {name} has shape {bias.shape}; expected {outputs}"
    return None


def misshapen(
    normalizers: Mapping[str, Normalizer],
    hessians: Mapping[str, Any],
    hessians_eigen: Mapping[str, Any],
) -> str | None:
    """What is wrong with the arrays' shapes, in words; None if nothing is."""
    for name, normalizer in normalizers.items():
        if problem := _misshapen_normalizer(name, vars(normalizer)):
            return problem
    for name, matrix in hessians.items():
        if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
            return f"the Hessian of {name} has shape {matrix.shape}; expected a square matrix"
    for name, (values, vectors) in hessians_eigen.items():
        d = vectors.shape[0] if vectors.shape else 0
        if name in hessians:
            d = hessians[name].shape[0]
        elif hessians:
            return f"there are eigenpairs of {name}, which has no Hessian; expected both"
        if values.shape != (d,) or vectors.shape != (d, d):
            return (
                f"the eigenpairs of {name} have shapes {values.shape} and {vectors.shape}; "
                f"expected {(d,)} and {(d, d)}"
            )
    return None
