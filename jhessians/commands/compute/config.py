"""Options of a `compute` run: tables that the parser, `--help` and config.yaml share.

Names and meanings follow bergson 2.5.1 wherever both tools have the option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from jhessians.config.inputs import InputOptions
from jhessians.config.machine import (
    ConsoleOptions,
    HostOptions,
    MachineOptions,
    OutputOptions,
    ProfileOptions,
    SavingOptions,
)
from jhessians.config.numbers import NumberOptions
from jhessians.config.option import check_tables, options_of
from jhessians.config.provenance import bergson_places, config_document
from jhessians.config.replay import Replayable
from jhessians.config.statistics import StatisticsOptions
from jhessians.errors import ConfigError
from jhessians.methods.method import Method
from jhessians.methods.table import METHODS, MethodChoice

_METHODS_OWN: Any = tuple(dict.fromkeys(each.options for each in METHODS.values()))[::-1]


# A dataclass has its last base's fields first.
@dataclass(frozen=True)
class ComputeConfig(
    ConsoleOptions,
    ProfileOptions,
    SavingOptions,
    HostOptions,
    OutputOptions,
    MachineOptions,
    *_METHODS_OWN,  # type: ignore[misc]
    StatisticsOptions,
    MethodChoice,
    NumberOptions,
    InputOptions,
    Replayable,
):
    """Everything a `compute` run depends on, the own options of every method among it.

    Values are checked on construction; `validate` checks how they go together.

    Raises:
        ConfigError: If a value has the wrong type, or lies outside its choices or range.
    """

    command: ClassVar[str] = "compute"

    @property
    def chosen(self) -> Method:
        """The method that `--method` names."""
        return METHODS[self.method]

    @property
    def method_options(self) -> Any:
        """The chosen method's own options, an instance of its `options`."""
        own = self.chosen.options
        return own(**{each.name: getattr(self, each.name) for each in options_of(own)})

    @property
    def corrects_eigenvalues(self) -> bool:
        """Whether the eigenvalue correction is computed, whichever way it was asked for."""
        return self.chosen.ev_correction if self.ev_correction is None else self.ev_correction

    @property
    def takes_dataset_labels(self) -> bool:
        """Whether labels are the data set's, whichever way it was asked for."""
        return self.use_dataset_labels or (self.fisher_type or self.chosen.labels) == "dataset"

    @property
    def gradient_reduction(self) -> Literal["sum", "mean", "mean_gradient"]:
        """How `--loss_reduction` scales gradients, as `NextTokenLoss` names it.

        With mean, bergson divides by the number of labelled positions where gradients are wanted,
        and by its square root where a factored curvature is.
        """
        return "sum" if self.loss_reduction == "sum" else self.chosen.mean_reduction

    def validate(self) -> None:
        """Check the options against each other.

        Raises:
            ConfigError: With one line: what clashes and what to change.
        """
        _check_owners(self)
        check_tables(self)
        _check_between_tables(self)

    def bergson_step(
        self, *, model: str, dataset: str, shards: int, processes: int = 1
    ) -> dict[str, Any] | None:
        """The run as a `hessian` step of bergson 2.5.1, in plain YAML types.

        Args:
            model: Name or folder of the model that was used, the demo's too.
            dataset: The same for the data set.
            shards: Files per factor. bergson has one process per shard, so this becomes its
                world size.
            processes: Hosts that took part; kept as bergson's nodes where they divide the shards.

        Returns:
            `{"hessian": {"hessian_cfg": …, "index_cfg": …}}`; None if bergson lacks the method.
        """
        if self.chosen.bergson is None:
            return None
        values = self.resolved_dict() | {
            "model": model,
            "dataset": dataset,
            # bergson writes "the model's own" as an empty name.
            "tokenizer": self.tokenizer or "",
            "optimizer_state": self.optimizer_state or "",
            "moe_experts": self.moe_experts or "",
            # Its own default, which only heads that are split would mind.
            "head_dim": self.head_dim if self.split_attention_modules else 0,
            "use_dataset_labels": self.takes_dataset_labels,
        }
        step = bergson_places(options_of(type(self)), values)
        method = {"method": self.chosen.bergson, "ev_correction": self.corrects_eigenvalues}
        nodes = processes if shards % processes == 0 else 1
        world = {"nnode": nodes, "nproc_per_node": shards // nodes}
        return {
            "hessian": {
                "hessian_cfg": method | step["hessian_cfg"],
                "index_cfg": {"run_path": self.run_path, **step["index_cfg"], "distributed": world},
            }
        }

    def document(self, *, devices: Sequence[str] = (), **names: Any) -> dict[str, Any]:
        """All of config.yaml.

        Args:
            devices: See `run_metadata`.
            names: Arguments of `bergson_step`.

        Returns:
            Nested tables, in plain YAML types: bergson's steps, our options, and where and when it
                ran.
        """
        step = self.bergson_step(**names)
        return config_document("compute", self.resolved_dict(), step, devices=devices)


def _check_owners(config: ComputeConfig) -> None:
    """Refuse options that belong to another method than the chosen one.

    Raises:
        ConfigError: The first one found.
    """
    method = config.chosen
    for other in METHODS.values():
        for each in options_of(other.options):
            given = getattr(config, each.name) != each.default
            if given and other.options is not method.options:
                raise ConfigError(
                    f"--{each.name} belongs to --method {other.name}, not {method.name}; "
                    "leave it out"
                )


def _check_between_tables(config: ComputeConfig) -> None:
    """Refuse options of different tables that contradict each other, or say nothing together.

    Raises:
        ConfigError: The first clash found.
    """
    _check_method(config)
    _check_labels(config)
    if config.chunk_length > config.token_batch_size:
        raise ConfigError(
            f"--chunk_length {config.chunk_length} exceeds "
            f"--token_batch_size {config.token_batch_size}; raise the one or lower the other"
        )
    if config.moe_experts and config.attribute_tokens:
        raise ConfigError(
            "--attribute_tokens wants a gradient from every token, but an expert of --moe_experts "
            "reads only some; leave one of them out"
        )
    if config.profile_trace is not None:
        run, trace = Path(config.run_path).absolute(), Path(config.profile_trace).absolute()
        if trace.is_relative_to(run):
            raise ConfigError(
                f"--profile_trace {config.profile_trace} lies in RUN_PATH, which appears only "
                "when the run is done; give a folder outside of it"
            )


def _check_method(config: ComputeConfig) -> None:
    method = config.chosen
    if method.ev_correction and config.ev_correction is False:
        raise ConfigError(
            f"--method {method.name} includes the eigenvalue correction, "
            "yet --ev_correction is false; use --method kfac"
        )
    if method.factored:
        return
    needs_factors = {
        "ev_correction": (config.ev_correction, "corrects Kronecker factors", ""),
        "num_shards": (config.num_shards is not None, "splits Kronecker factors", ""),
        "module_partitions": (
            config.module_partitions != 1,
            "divides the fit of Kronecker factors",
            ", or choose with --modules",
        ),
    }
    for name, (given, does, instead) in needs_factors.items():
        if given:
            raise ConfigError(
                f"--{name} {does}, which --method {method.name} has none of; leave it out{instead}"
            )


def _check_labels(config: ComputeConfig) -> None:
    if config.takes_dataset_labels and config.mc_samples > 1:
        raise ConfigError(
            f"--mc_samples {config.mc_samples} draws labels, yet they are the data set's; "
            "use --fisher_type sampled or leave it out"
        )
    if not config.takes_dataset_labels:
        for name, given in (("loss_fn log_odds", config.loss_fn == "log_odds"),
                            ("label_smoothing", config.label_smoothing > 0)):  # fmt: skip
            if given:
                raise ConfigError(
                    f"--{name} is for the data set's labels, while these are sampled; "
                    "add --fisher_type dataset"
                )
