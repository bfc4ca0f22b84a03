"""How the options of a `compute` run go together: checked before any model is loaded.

Every message is one line: what clashes, and what to change.
"""

from __future__ import annotations

from pathlib import Path

from jhessians.commands.compute_config import ComputeConfig
from jhessians.config.option import Option, options_of
from jhessians.config.statistics import METHODS
from jhessians.devices.precision import HIGHEST
from jhessians.errors import ConfigError
from jhessians.methods.autocorrelation_options import AUTOCORRELATION

HEAD_AXIS = 2  # the features' of [document, position, feature]


def check_together(config: ComputeConfig) -> None:
    """Refuse options that contradict each other, or that say nothing where they stand.

    Raises:
        ConfigError: The first clash found.
    """
    _check_sources(config)
    _check_numbers(config)
    _check_method(config)
    _check_loss(config)
    _check_chunks(config)
    _check_projection(config)
    _check_heads(config)
    _check_experts(config)
    _check_trace(config)


def _check_sources(config: ComputeConfig) -> None:
    if not config.run_path.strip():
        raise ConfigError("RUN_PATH is empty; give the folder to write, such as runs/demo")
    if config.is_demo:
        for name in ("revision", "tokenizer", "subset"):
            if getattr(config, name) is not None:
                raise ConfigError(
                    f"--{name} says nothing about the embedded demo; "
                    "give --model and --dataset with it, or leave it out"
                )
    elif config.model is None or config.dataset is None:
        given, missing = ("model", "dataset") if config.model else ("dataset", "model")
        raise ConfigError(
            f"--{given} is given without --{missing}; give both, or neither for the embedded demo"
        )
    if config.completion_column and config.conversation_column:
        raise ConfigError(
            "--completion_column and --conversation_column exclude each other; give one"
        )
    if not config.prompt_column and not config.conversation_column:
        raise ConfigError("--prompt_column is empty; name the column that holds the text")


def _check_numbers(config: ComputeConfig) -> None:
    if config.matmul_precision == HIGHEST:
        return
    # XLA would round 64 bits to these as well, and widen 16 bits to no end.
    for name in ("precision", "hessian_dtype"):
        other = getattr(config, name)
        if other == "fp64" or (name == "precision" and other != "fp32"):
            raise ConfigError(
                f"--matmul_precision {config.matmul_precision} is for products of float32 numbers, "
                f"not for --{name} {other}; leave one of them out"
            )


def _check_method(config: ComputeConfig) -> None:
    method = next(each for each in METHODS if each.name == config.method)
    if method.ev_correction and config.ev_correction is False:
        raise ConfigError(
            f"--method {config.method} includes the eigenvalue correction, "
            "yet --ev_correction is false; use --method kfac"
        )
    if config.normalize_trace and config.method != "tkfac":
        raise ConfigError(
            f"--normalize_trace belongs to --method tkfac, not {config.method}; leave it out"
        )
    if method.factored:
        for each in _given(config, AUTOCORRELATION):
            raise ConfigError(
                f"--{each.name} belongs to --method autocorrelation, not {config.method}; "
                "leave it out"
            )
        return
    if config.ev_correction:
        raise ConfigError(
            f"--ev_correction corrects Kronecker factors, which --method {config.method} has none "
            "of; leave it out"
        )
    if config.num_shards is not None:
        raise ConfigError(
            f"--num_shards splits Kronecker factors, which --method {config.method} has none of; "
            "leave it out"
        )
    if config.module_partitions != 1:
        raise ConfigError(
            f"--module_partitions divides the fit of Kronecker factors, which --method "
            f"{config.method} has none of; leave it out, or choose with --modules"
        )


def _check_loss(config: ComputeConfig) -> None:
    if config.use_dataset_labels and config.fisher_type == "sampled":
        raise ConfigError(
            "--use_dataset_labels contradicts --fisher_type sampled; give one of them"
        )
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


def _check_chunks(config: ComputeConfig) -> None:
    if config.chunk_length == 0:
        return
    if config.chunk_length == 1:
        raise ConfigError("--chunk_length 1 leaves no token to predict; give 2 or more")
    if config.truncation:
        raise ConfigError("--chunk_length and --truncation exclude each other; give one")
    if config.completion_column or config.conversation_column:
        column = "completion_column" if config.completion_column else "conversation_column"
        raise ConfigError(
            f"--chunk_length joins plain text and cannot follow --{column}; leave one out"
        )
    if config.chunk_length > config.token_batch_size:
        raise ConfigError(
            f"--chunk_length {config.chunk_length} exceeds "
            f"--token_batch_size {config.token_batch_size}; raise the one or lower the other"
        )


def _check_projection(config: ComputeConfig) -> None:
    if config.reshape_to_square and config.projection_target == "global":
        raise ConfigError(
            "--reshape_to_square reshapes a module's gradient, while --projection_target global "
            "flattens it; give one"
        )
    if not config.projection_dim:
        for each in _given(config, AUTOCORRELATION):
            if each.name.startswith("projection_") or each.name == "reshape_to_square":
                raise ConfigError(
                    f"--{each.name} says nothing without a projection; "
                    "add --projection_dim, such as 16"
                )
    if config.normalizer != "none" and config.optimizer_state is not None:
        raise ConfigError(
            f"--normalizer {config.normalizer} is estimated from the data, while "
            "--optimizer_state reads it from a file; give one"
        )


def _check_heads(config: ComputeConfig) -> None:
    sizes = [name for name in ("num_heads", "head_size") if not getattr(config, name)]
    if config.split_attention_modules and sizes:
        raise ConfigError(
            f"--split_attention_modules needs --{sizes[0]}; num_heads x head_size is the modules' "
            "number of output features"
        )
    if not config.split_attention_modules:
        for each in _given(config, AUTOCORRELATION):
            if each.name in ("num_heads", "head_size", "head_dim"):
                raise ConfigError(
                    f"--{each.name} says nothing without --split_attention_modules; name the "
                    "modules, or leave it out"
                )
    if config.head_dim != HEAD_AXIS:
        raise ConfigError(
            f"--head_dim {config.head_dim} is no axis of features; heads are split along axis "
            f"{HEAD_AXIS} of [document, position, feature]: leave it out"
        )


def _check_experts(config: ComputeConfig) -> None:
    if config.moe_experts and config.attribute_tokens:
        raise ConfigError(
            "--attribute_tokens wants a gradient from every token, but an expert of --moe_experts "
            "reads only some; leave one of them out"
        )


def _check_trace(config: ComputeConfig) -> None:
    if config.profile_trace is None:
        return
    run, trace = Path(config.run_path).absolute(), Path(config.profile_trace).absolute()
    if trace.is_relative_to(run):
        raise ConfigError(
            f"--profile_trace {config.profile_trace} lies in RUN_PATH, which appears only when the "
            "run is done; give a folder outside of it"
        )


def _given(config: ComputeConfig, group: str) -> list[Option]:
    """The options of a group that are not as they are by default."""
    return [
        each
        for each in options_of(type(config))
        if each.group == group and getattr(config, each.name) != each.default
    ]
