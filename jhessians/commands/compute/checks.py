"""How options of different tables go together: checked before any model is loaded.

Every message is one line: what clashes, and what to change.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jhessians.config.option import options_of
from jhessians.errors import ConfigError
from jhessians.methods.table import METHODS

if TYPE_CHECKING:
    from jhessians.commands.compute.config import ComputeConfig


def check_owners(config: ComputeConfig) -> None:
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


def check_between_tables(config: ComputeConfig) -> None:
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
