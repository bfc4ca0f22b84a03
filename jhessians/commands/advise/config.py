"""Options of `advise`; what is not given is as in the run. No JAX is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.output import check_json_file
from jhessians.commands.score.hessian import options_of_run
from jhessians.config.inherited import given, inherited, some_of
from jhessians.config.inputs import InputOptions
from jhessians.config.inversion import INVERSE
from jhessians.config.machine import (
    OUTPUT,
    ConsoleOptions,
    DeviceOptions,
    HostOptions,
    MachineOptions,
)
from jhessians.config.option import check, option, options_of
from jhessians.errors import CheckpointError, ConfigError

HALVES = "what is examined"

_OF_THE_RUN = (
    "model", "revision", "tokenizer", "dataset", "split", "subset", "token_batch_size", "fsdp",
    "activations", "module_partitions",
)  # fmt: skip
_RunOptions: Any = inherited(
    "_RunOptions", (InputOptions, MachineOptions), _OF_THE_RUN, source="the run"
)
_Devices: Any = some_of("_Devices", DeviceOptions, ("world_size", "mesh"))
GRID = ("1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "1")


@dataclass(frozen=True)
class _AdviceOptions:
    """What is examined, and with how much work."""

    spectrum_only: bool = option(
        False,
        "Read the factors alone, and make no pass over the data: ranks, condition numbers, noise "
        "floor and dead experts.",
        group=HALVES,
    )
    half_documents: int | None = option(
        None,
        "Documents in each of the two halves that are fitted; errors of the whole run are "
        "extrapolated from them.",
        group=HALVES, value_type="integer", metavar="N", unit="documents", minimum=2,
        default_text="half of those that are not held out",
    )  # fmt: skip
    held_out_queries: int = option(
        8,
        "Documents whose gradients are the vectors q that inverses are applied to; they are in "
        "neither half, and at most an eighth of the data.",
        group=HALVES, metavar="K", unit="documents", minimum=1,
    )  # fmt: skip
    held_out_documents: int = option(
        32,
        "Other documents, in neither half, whose Gauss-Newton Hessian judges the damping factors; "
        "at most an eighth of the data; 0 tries no damping factors.",
        group=HALVES, metavar="B", unit="documents", minimum=0,
    )  # fmt: skip
    halves_seed: int = option(
        0, "Of the random division of the documents.", group=HALVES, metavar="SEED", minimum=0
    )
    dampings: tuple[str, ...] = option(
        GRID,
        "Damping factors to try, relative to each module's mean eigenvalue.",
        group=INVERSE, metavar="C", default_text=" ".join(GRID),
    )  # fmt: skip
    damping_factor: float = option(
        0.01,
        "The one whose inverse the halves are compared by, and the damped condition number is of.",
        group=INVERSE, metavar="C", minimum=0.0,
    )  # fmt: skip
    json: str | None = option(
        None, "Write all numbers, module by module, to this file.",
        group=OUTPUT, metavar="PATH", default_text="no file",
    )  # fmt: skip


@dataclass(frozen=True)
class AdviseConfig(ConsoleOptions, HostOptions, _Devices, _RunOptions, _AdviceOptions):
    """Everything that `advise` depends on, besides what the run says.

    Raises:
        ConfigError: If a value has the wrong type, or lies outside its choices or range.
    """

    run: str = ""

    def __post_init__(self) -> None:
        for each in options_of(type(self)):
            object.__setattr__(self, each.name, check(each, getattr(self, each.name)))

    @property
    def tried(self) -> tuple[float, ...]:
        """The damping factors to try, ascending.

        Raises:
            ConfigError: If one is no positive number.
        """
        found = set()
        for word in self.dampings:
            try:
                number = float(word)
            except ValueError:
                number = math.nan
            if not 0 < number < math.inf:
                raise ConfigError(f"--dampings takes positive numbers, got {word!r}")
            found.add(number)
        return tuple(sorted(found))

    @property
    def fit(self) -> ComputeConfig:
        """The run's own options with what is given here instead.

        Raises:
            ConfigError: If the run doesn't say how it was fitted, or has no Kronecker factors.
        """
        try:
            options = options_of_run(self.run)
        except (ConfigError, CheckpointError) as error:
            raise ConfigError(
                f"{self.run} doesn't say which model and data it was fitted on ({error}); give a "
                "folder with its config.yaml, or --spectrum_only for what needs no data"
            ) from None
        if self.model is not None:
            options.pop("revision", None)  # the other model's
        if self.dataset is not None:
            options.pop("subset", None)  # the other data set's
        options |= given(self, _OF_THE_RUN)
        options |= {"world_size": self.world_size, "mesh": self.mesh, "run_path": self.run}
        options["profile_trace"] = None
        found = ComputeConfig.from_dict(options, where=self.run)
        if not found.chosen.factored:
            raise ConfigError(
                f"{self.run} has the dense Hessian of --method {found.method}; advise is for "
                "Kronecker factors: give a run of another method"
            )
        return found

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return not self.spectrum_only and self.fit.needs_float64

    def validate(self) -> None:
        """Check the options against each other.

        Raises:
            ConfigError: With one line: what clashes and what to change.
        """
        if not self.run.strip():
            raise ConfigError("RUN is empty; give the folder of a finished run")
        if not Path(self.run).is_dir():
            raise ConfigError(
                f"{self.run} is no folder; give a finished run of jhessians compute or of bergson"
            )
        if len(self.tried) < 2:
            raise ConfigError("--dampings has one number; give two or more to choose from")
        if self.spectrum_only:
            apart = ("spectrum_only", "damping_factor", "json", *(
                each.name for each in options_of(ConsoleOptions)))  # fmt: skip
            for each in options_of(type(self)):
                if each.name not in apart and getattr(self, each.name) != each.default:
                    raise ConfigError(
                        f"--{each.name} is about passes over the data, which --spectrum_only "
                        "leaves out; give one of them"
                    )
        else:
            self.fit.validate()
        if self.overwrite and self.json is None:
            raise ConfigError("--overwrite is given without --json, and nothing else is written")
        if self.json is not None:
            self._check_file(Path(self.json))

    def _check_file(self, path: Path) -> None:
        check_json_file(path, overwrite=self.overwrite)
        if path.resolve().is_relative_to(Path(self.run).resolve()):
            raise ConfigError(
                f"--json {path} lies in the run, which is finished; give a file outside of it"
            )
