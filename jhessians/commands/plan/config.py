"""Options of `plan`: the machines, and those of `compute` that bear on what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.output import check_json_file
from jhessians.config.inherited import names_of, some_of
from jhessians.config.machine import OUTPUT, ConsoleOptions, ProfileOptions, SavingOptions
from jhessians.config.option import check, option, options_of
from jhessians.errors import ConfigError

MACHINES = "machines"

_LEFT_OUT = {
    *names_of(ConsoleOptions, ProfileOptions, SavingOptions),
    "run_path", "model", "world_size", "num_shards", "timeout_minutes", "join_minutes", "offload",
}  # fmt: skip
_TAKEN = tuple(name for name in names_of(ComputeConfig) if name not in _LEFT_OUT)
_FitOptions: Any = some_of("_FitOptions", ComputeConfig, _TAKEN)

LENGTH = 2048
TOKENS = 10_000_000


@dataclass(frozen=True)
class _MachineOptions:
    """On what the fit is to run, and on how much."""

    topology: str | None = option(
        None,
        "Slice of TPUs: the kind and its sides, such as v5e:4x4 or v5p:4x4x4.",
        group=MACHINES, metavar="KIND:SIDES", default_text="this machine's devices",
    )  # fmt: skip
    devices: str | None = option(
        None,
        "Devices: a number and a kind, such as 8xH100 or 16xA100.",
        group=MACHINES, metavar="NxKIND", default_text="this machine's devices",
    )  # fmt: skip
    memory: str | None = option(
        None,
        "Memory of each device, such as 24GB: of one device of no known kind, or instead of what "
        "those of --devices have.",
        group=MACHINES, metavar="SIZE", default_text="what the devices have",
    )  # fmt: skip
    document_length: int | None = option(
        None,
        "Without --dataset: tokens of each document.",
        group=MACHINES, value_type="integer", metavar="TOKENS", unit="tokens", minimum=2,
        default_text=f"{LENGTH}, or what the model and a batch take",
    )  # fmt: skip
    compile: bool = option(
        False,
        "Let XLA's compiler for TPUs compile the real steps for --topology, without a TPU, and "
        "show its own figures beside the estimate; takes minutes, and the package libtpu.",
        group=MACHINES,
    )
    json: str | None = option(
        None, "Write the plan to this file.",
        group=OUTPUT, metavar="PATH", default_text="no file",
    )  # fmt: skip


@dataclass(frozen=True)
class PlanConfig(ConsoleOptions, _FitOptions, _MachineOptions):
    """Everything that a plan depends on.

    Raises:
        ConfigError: If a value has the wrong type, or lies outside its choices or range.
    """

    model: str = ""

    def __post_init__(self) -> None:
        for each in options_of(type(self)):
            object.__setattr__(self, each.name, check(each, getattr(self, each.name)))

    @property
    def fit(self) -> ComputeConfig:
        """The fit that is planned.

        Raises:
            ConfigError: If one of its options has a wrong value.
        """
        taken = {name: getattr(self, name) for name in _TAKEN}
        if self.dataset is None:
            taken["dataset"] = "none"  # a fit has one; it isn't read
        return ComputeConfig(run_path="planned", model=self.model, **taken)

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return self.fit.needs_float64

    def validate(self) -> None:
        """Check the options against each other.

        Raises:
            ConfigError: With one line: what clashes and what to change.
        """
        if not self.model.strip():
            raise ConfigError("MODEL is empty; give a folder or a name on the Hub")
        if self.topology is not None and self.devices is not None:
            raise ConfigError("--topology and --devices exclude each other; give one")
        if self.topology is not None and self.memory is not None:
            raise ConfigError(
                "--memory is given, but the chips of --topology have theirs; give one"
            )
        if self.compile and self.topology is None:
            raise ConfigError("--compile asks the compiler for TPUs; give a --topology with it")
        if self.document_length is not None and self.dataset is not None:
            raise ConfigError(
                "--document_length is for a plan without data, yet --dataset is given; give one"
            )
        self.fit.validate()
        if self.overwrite and self.json is None:
            raise ConfigError("--overwrite is given without --json, and nothing else is written")
        if self.json is not None:
            check_json_file(Path(self.json), overwrite=self.overwrite)
