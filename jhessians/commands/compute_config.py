"""Options of a `compute` run: one table that the parser, `--help` and config.yaml share.

Names and meanings follow bergson 2.5.1 wherever both tools have the option.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jhessians.config.machine import MachineOptions
from jhessians.config.option import check_all, options_of
from jhessians.config.statistics import METHODS, Method, StatisticsOptions
from jhessians.errors import ConfigError
from jhessians.methods.autocorrelation_options import AutocorrelationOptions


@dataclass(frozen=True)
class ComputeConfig(MachineOptions, AutocorrelationOptions, StatisticsOptions):
    """Everything a `compute` run depends on.

    Values are checked on construction; `validate` checks how they go together.

    Raises:
        ConfigError: If a value has the wrong type, or lies outside its choices or range.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "run_path", os.fspath(self.run_path))
        values = {each.name: getattr(self, each.name) for each in options_of(type(self))}
        for name, value in check_all(options_of(type(self)), values, where="the config").items():
            object.__setattr__(self, name, value)

    @property
    def is_demo(self) -> bool:
        """Whether the run takes the embedded checkpoint and data set."""
        return self.model is None and self.dataset is None

    @property
    def _method(self) -> Method:
        return next(each for each in METHODS if each.name == self.method)

    @property
    def bergson_method(self) -> str:
        """The method as bergson names it, also its folder under `hessian/`."""
        return self._method.bergson

    @property
    def corrects_eigenvalues(self) -> bool:
        """Whether the eigenvalue correction is computed, whichever way it was asked for."""
        return self._method.ev_correction if self.ev_correction is None else self.ev_correction

    @property
    def takes_dataset_labels(self) -> bool:
        """Whether labels are the data set's, whichever way it was asked for."""
        default = "sampled" if self.is_factored else "dataset"
        return self.use_dataset_labels or (self.fisher_type or default) == "dataset"

    @property
    def is_factored(self) -> bool:
        """Whether the method is made of Kronecker factors, rather than of dense Grams."""
        return self._method.factored

    @property
    def gradient_reduction(self) -> Literal["sum", "mean", "mean_gradient"]:
        """How `--loss_reduction` scales gradients, as `NextTokenLoss` names it.

        With mean, bergson divides by the number of labelled positions where gradients are wanted,
        and by its square root where a factored curvature is.
        """
        if self.loss_reduction == "sum":
            return "sum"
        return "mean" if self.is_factored else "mean_gradient"

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return "fp64" in (self.precision, self.hessian_dtype)

    def validate(self) -> None:
        """Check the options against each other.

        Raises:
            ConfigError: With one line: what clashes and what to change.
        """
        from jhessians.commands.compute_checks import check_together

        check_together(self)

    def resolved_dict(self) -> dict[str, Any]:
        """Every option under its name, in plain YAML types; `from_dict` reads it back."""
        values = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "the config") -> ComputeConfig:
        """Build a config from names and values; what is missing keeps its default.

        Raises:
            ConfigError: If a name is unknown, a value is wrong or `run_path` is missing.
        """
        values = dict(values)
        run_path = values.pop("run_path", None)
        if not isinstance(run_path, str):
            raise ConfigError(f"{where} has no run_path; give the folder to write")
        return cls(run_path=run_path, **check_all(options_of(cls), values, where=where))

    @classmethod
    def from_yaml(cls, path: str | Path) -> ComputeConfig:
        """The config of an earlier run, from its config.yaml or the folder that holds it.

        Raises:
            ConfigError: If the file is missing, is no YAML or holds no options of ours.
        """
        from jhessians.config.provenance import read_options

        return cls.from_dict(read_options(path), where=str(path))
