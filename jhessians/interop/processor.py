"""bergson's `GradientProcessor`: how gradients are normalised and projected, and their Hessians.

A folder with `processor_config.yaml` (the settings), `normalizers.pth`, `hessians.pth` (module →
[d, d], an autocorrelation) and `hessians_eigen.pth` (module → (values [d], vectors [d, d])).
Older versions called the last two `preconditioners*.pth`, and the first `processor_config.json`.
An option called `processor_path` takes such a folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jhessians.errors import CheckpointError, did_you_mean, quoted
from jhessians.files import read_json, read_yaml
from jhessians.folds.normalizers import Normalizer
from jhessians.interop import torchfile
from jhessians.interop.manifest import check_files
from jhessians.interop.processor_files import (
    EIGEN_FILE,
    HESSIANS_FILE,
    NORMALIZERS_FILE,
    EigenPair,
    Matrix,
    misshapen,
    normalizer_state,
    read_hessians,
    read_normalizers,
    tensor_files,
)
from jhessians.interop.rundir import output_error

CONFIG_FILE = "processor_config.yaml"
LEGACY_CONFIG_FILE = "processor_config.json"
SETTINGS_FILES = {CONFIG_FILE, LEGACY_CONFIG_FILE}

PROJECTION_VERSION = 2
"""The way of making projection matrices; version 1 was torch's generators, which we don't have."""

PROJECTION_SETTINGS = (
    "projection_dim",
    "projection_type",
    "projection_scale",
    "projection_seed",
    "projection_target",
    "include_bias",
    "projection_version",
)
"""Settings in which two sets of projected gradients must agree to be comparable."""

# Values of settings that a file lacks because it is older than the setting.
_BEFORE_THE_SETTING = {
    "projection_type": "normal",
    "include_bias": False,
    "projection_scale": "row_norm",
    "projection_version": 1,
}


@dataclass
class GradientProcessor:
    """Settings, normalizers and autocorrelation Hessians of projected gradients.

    Attributes:
        normalizers: Module → its normalizer; modules without one are not normalised.
        hessians: Module → its autocorrelation, [d, d]; d is the size of a projected gradient.
        hessians_eigen: Module → eigenvalues [d], ascending, and eigenvectors [d, d], columns.
        projection_dim: p; None (or 0) if gradients are not projected.
        reshape_to_square: Whether gradients are reshaped to be nearly square before that.
        projection_type: Distribution of the matrices' entries.
        projection_target: A projection for each module, or one for all together.
        projection_scale: `jl` divides the matrices by √p, `row_norm` makes their rows unit vectors.
        include_bias: Whether biases count as one more column of the gradient.
        projection_seed: Every seed gives other matrices; None is bergson's default.
        projection_version: How the matrices were made; `PROJECTION_VERSION` is how we make them.

    Raises:
        ValueError: If a setting has a wrong value.
    """

    normalizers: Mapping[str, Normalizer] = field(default_factory=dict)
    hessians: Mapping[str, Matrix] = field(default_factory=dict)
    hessians_eigen: Mapping[str, EigenPair] = field(default_factory=dict)
    projection_dim: int | None = None
    reshape_to_square: bool = False
    projection_type: Literal["normal", "rademacher"] = "rademacher"
    projection_target: Literal["per_module", "global"] = "per_module"
    projection_scale: Literal["jl", "row_norm"] = "jl"
    include_bias: bool = False
    projection_seed: int | None = None
    projection_version: int = PROJECTION_VERSION

    def __post_init__(self) -> None:
        for name, (is_valid, expected) in _SETTINGS.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"{name} is {quoted(value)}; expected {expected}")
        if not self.projection_dim:  # bergson's options say 0, its files null
            self.projection_dim = None
            self.projection_target = "per_module"

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, in the order of bergson's file."""
        return {name: getattr(self, name) for name in _SETTINGS}

    def save(self, path: str | Path) -> None:
        """Write the folder's four files, which bergson reads.

        Args:
            path: Created if missing.

        Raises:
            OutputError: If it can't be written.
            ValueError: If an array has a wrong shape.
        """
        import yaml

        path = Path(path)
        if problem := misshapen(self.normalizers, self.hessians, self.hessians_eigen):
            raise ValueError(problem)
        try:
            path.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(self.settings, sort_keys=False)
            (path / CONFIG_FILE).write_text(text, encoding="utf-8")
        except OSError as error:
            raise output_error(error, path) from error
        states = {
            name: normalizer_state(normalizer) for name, normalizer in self.normalizers.items()
        }
        torchfile.save(states, path / NORMALIZERS_FILE)
        torchfile.save(dict(self.hessians), path / HESSIANS_FILE)
        torchfile.save({k: tuple(v) for k, v in self.hessians_eigen.items()}, path / EIGEN_FILE)

    @classmethod
    def load(cls, path: str | Path, *, skip_hessians: bool = False) -> "GradientProcessor":
        """Read a folder that bergson, its older versions or `save` wrote.

        Args:
            path: The folder.
            skip_hessians: Leave `hessians` and `hessians_eigen` empty, and their files unread.

        Returns:
            The processor, with numpy arrays. Folders of an older version may have no eigenpairs.

        Raises:
            CheckpointError: If a file is missing, damaged, holds something else, or has another
                size than the manifest says.
            NumericsError: If a number isn't finite.
        """
        path = Path(path)
        check_files(path, (SETTINGS_FILES | tensor_files(skip_hessians)).__contains__)
        settings = _read_settings(path)
        normalizers = read_normalizers(path)
        hessians, eigen = ({}, {}) if skip_hessians else read_hessians(path)
        try:
            processor = cls(normalizers, hessians, eigen, **settings)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {error}; restore its processor_config or make it again"
            ) from None
        if problem := misshapen(normalizers, hessians, eigen):
            raise CheckpointError(f"{path}: {problem}; restore it or make it again")
        return processor

    def projection_differences(self, other: "GradientProcessor") -> list[str]:
        """Settings that keep gradients of two processors from being compared, in words."""
        # Without a projection, the other settings do nothing.
        names = PROJECTION_SETTINGS if self.projection_dim else ("projection_dim",)
        return [
            f"{name} {getattr(self, name)!r} against {getattr(other, name)!r}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, f"one of {', '.join(choices)}"


_FLAG = (lambda value: isinstance(value, bool), "true or false")

# Every setting, in the order of bergson's file: its check, and the expected value in words.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "projection_dim": (
        lambda value: value is None or (_is_whole(value) and value >= 0),
        "a whole number, or null for no projection",
    ),
    "reshape_to_square": _FLAG,
    "projection_type": _one_of("normal", "rademacher"),
    "projection_target": _one_of("per_module", "global"),
    "projection_scale": _one_of("jl", "row_norm"),
    "include_bias": _FLAG,
    "projection_seed": (lambda value: value is None or _is_whole(value), "a whole number or null"),
    "projection_version": (lambda value: _is_whole(value) and value >= 1, "a whole number from 1"),
}


def _read_settings(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.exists() and (path / LEGACY_CONFIG_FILE).exists():
        file = path / LEGACY_CONFIG_FILE
    try:
        values = read_json(file) if file.suffix == ".json" else read_yaml(file)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file} ({error.strerror}); expected the folder of a gradient processor"
        ) from None
    except ValueError:
        kind = file.suffix.removeprefix(".").upper()
        raise CheckpointError(f"{file} isn't valid {kind}; restore it or make it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no table of settings; restore it or make it again")
    settings = dict(_BEFORE_THE_SETTING)
    for key, value in values.items():
        name = str(key).replace("preconditioner", "hessian").replace("precond", "hess")
        if name in ("normalizers", "hessians", "hessians_eigen") and not value:
            continue  # the arrays' own fields, which an older version wrote empty
        if name not in _SETTINGS:
            hint = did_you_mean(name, _SETTINGS)
            raise CheckpointError(
                f"{file} has the unknown setting {quoted(key)}{hint or '; remove it'}"
            )
        settings[name] = value
    return settings
