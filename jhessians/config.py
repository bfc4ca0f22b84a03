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

from jhessians.errors import ConfigError
from jhessians.interop.layout import Layout
from jhessians.methods.autocorrelation_options import AutocorrelationOptions
from jhessians.options import check_all, option, options_of
from jhessians.precision import HIGHEST, MATMUL_PRECISIONS

SOURCES = "what to run on"
DATA = "data"
NUMBERS = "numbers"
STATISTICS = "statistics"
MACHINE = "machine"
OUTPUT = "output"

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")


@dataclass(frozen=True)
class Method:
    """One way to approximate the Hessian.

    Attributes:
        name: As typed after `--method`.
        bergson: What bergson calls it in `hessian_cfg.method`.
        ev_correction: Whether the eigenvalue correction belongs to it.
        factored: Whether it is made of Kronecker factors, rather than of dense Grams.
    """

    name: str
    bergson: str
    ev_correction: bool = False
    factored: bool = True


METHODS = (
    Method("ekfac", bergson="kfac", ev_correction=True),
    Method("kfac", bergson="kfac"),
    Method("tkfac", bergson="tkfac"),
    Method("shampoo", bergson="shampoo"),
    Method("autocorrelation", bergson="autocorrelation", factored=False),
)


@dataclass(frozen=True)
class _StatisticsOptions:
    """What is computed, of which model and data, by any method."""

    run_path: str

    model: str | None = option(
        None,
        "Hugging Face Hub name or local folder of the checkpoint, a folder that jhessians convert "
        "wrote, or a LoRA adapter, whose own linears are then recorded.",
        group=SOURCES,
        metavar="NAME",
        default_text="the embedded demo",
        bergson="index_cfg.model",
    )
    revision: str | None = option(
        None,
        "Branch, tag or commit of the model on the Hub.",
        group=SOURCES,
        metavar="REV",
        default_text="the main branch",
        bergson="index_cfg.revision",
    )
    tokenizer: str | None = option(
        None,
        "Hub name or local folder of the tokenizer.",
        group=SOURCES,
        metavar="NAME",
        default_text="the model's own",
        bergson="index_cfg.tokenizer",
    )
    dataset: str | None = option(
        None,
        "Hub name, a .json, .jsonl, .csv, .parquet or .txt file, or a save_to_disk folder.",
        group=SOURCES,
        metavar="NAME",
        default_text="the embedded demo",
        bergson="index_cfg.data.dataset",
    )

    split: str = option(
        "train",
        "Split of the data set; slices such as train[:100] work.",
        group=DATA,
        metavar="SPLIT",
        bergson="index_cfg.data.split",
    )
    subset: str | None = option(
        None,
        "Configuration of a data set that has several.",
        group=DATA,
        metavar="NAME",
        default_text="none",
        bergson="index_cfg.data.subset",
    )
    prompt_column: str = option(
        "text",
        "Column with the text, or with the prompt where there is a completion.",
        group=DATA,
        metavar="COLUMN",
        bergson="index_cfg.data.prompt_column",
    )
    completion_column: str = option(
        "",
        "Column with the completion; the loss is then taken on the completion only.",
        group=DATA,
        metavar="COLUMN",
        default_text="none",
        bergson="index_cfg.data.completion_column",
    )
    conversation_column: str = option(
        "",
        "Column with lists of chat messages; the loss is then taken on the assistant's turns only.",
        group=DATA,
        metavar="COLUMN",
        default_text="none",
        bergson="index_cfg.data.conversation_column",
    )
    truncation: bool = option(
        False,
        "Cut documents that are longer than the model or the token budget allows, instead of "
        "refusing them.",
        group=DATA,
        bergson="index_cfg.data.truncation",
    )
    chunk_length: int = option(
        0,
        "Join the documents and cut them into chunks of this many tokens.",
        group=DATA,
        metavar="TOKENS",
        unit="tokens",
        minimum=0,
        default_text="0 tokens, documents stay whole",
        bergson="index_cfg.data.chunk_length",
    )
    max_tokens: int | None = option(
        None,
        "Process this many tokens: the data set's beginning, or repetitions of a smaller one.",
        group=DATA,
        kind="integer",
        metavar="TOKENS",
        unit="tokens",
        minimum=2,
        default_text="each document once",
        bergson="index_cfg.max_tokens",
    )

    precision: str = option(
        "fp32",
        "Number format of the model's weights and activations.",
        group=NUMBERS,
        choices=PRECISIONS,
        bergson="index_cfg.precision",
    )
    hessian_dtype: str = option(
        "fp32",
        "Number format in which statistics are summed and stored; eigendecompositions always "
        "run in fp64.",
        group=NUMBERS,
        choices=PRECISIONS,
        bergson="hessian_cfg.hessian_dtype",
    )
    matmul_precision: str = option(
        HIGHEST,
        "How float32 numbers are multiplied: in full (highest) or, on GPU and TPU, faster and less "
        "exactly: split into parts, as so many products (bf16_x6, tf32_x3, bf16_x3), or rounded "
        "(tf32, bf16).",
        group=NUMBERS,
        metavar="HOW",
        choices=tuple(MATMUL_PRECISIONS),
    )
    seed: int = option(
        0,
        "Seed of the labels that are sampled from the model.",
        group=NUMBERS,
        metavar="N",
        minimum=0,
        maximum=2**32 - 1,
    )

    method: str = option(
        METHODS[0].name,
        "Approximation of the Hessian: the Kronecker factors of ekfac (kfac with the eigenvalue "
        "correction), kfac, tkfac or shampoo, or the dense Grams of autocorrelation.",
        group=STATISTICS,
        metavar="METHOD",
        choices=tuple(each.name for each in METHODS),
    )
    ev_correction: bool | None = option(
        None,
        "Compute the eigenvalue correction too, of any method: with it, kfac becomes ekfac.",
        group=STATISTICS,
        kind="flag",
        default_text="as the method implies: true for ekfac, else false",
    )
    normalize_trace: bool = option(
        False,
        "With tkfac, divide the activation factor by the trace, as its paper does and bergson "
        "does not.",
        group=STATISTICS,
    )
    fisher_type: str | None = option(
        None,
        "Labels: sampled from the model (the true Fisher) or the data set's own next tokens "
        "(the empirical Fisher).",
        group=STATISTICS,
        choices=("sampled", "dataset"),
        default_text="sampled; dataset for autocorrelation",
    )
    use_dataset_labels: bool = option(
        False,
        "bergson's name for --fisher_type dataset.",
        group=STATISTICS,
        bergson="hessian_cfg.use_dataset_labels",
    )
    mc_samples: int = option(
        1,
        "Labels to sample per position from one forward pass; the Fisher's variance falls with "
        "their number, the time of the backward pass grows.",
        group=STATISTICS,
        metavar="K",
        unit="label",
        minimum=1,
    )
    loss_fn: str = option(
        "ce",
        "Loss of a token: cross-entropy, or log_odds, -log(p / (1 - p)), of the data set's labels.",
        group=STATISTICS,
        choices=("ce", "log_odds"),
        bergson="index_cfg.loss_fn",
    )
    label_smoothing: float = option(
        0.0,
        "Share of each of the data set's labels that is spread over the vocabulary.",
        group=STATISTICS,
        metavar="SHARE",
        minimum=0.0,
        maximum=1.0,
        default_text="0",
        bergson="index_cfg.label_smoothing",
    )
    loss_reduction: str = option(
        "sum",
        "How a document's token losses make its loss.",
        group=STATISTICS,
        choices=("sum", "mean"),
        bergson="index_cfg.loss_reduction",
    )
    include_bias: bool = option(
        False,
        "Treat biases as one more input column of the modules that have one.",
        group=STATISTICS,
        bergson="index_cfg.include_bias",
    )
    modules: tuple[str, ...] = option(
        (),
        "Modules to take in: names or globs, separated by spaces or commas.",
        group=STATISTICS,
        metavar="GLOB",
        default_text="every linear but the output head",
        bergson="index_cfg.modules",
    )
    filter_modules: str | None = option(
        None,
        "Modules to leave out: globs separated by commas, such as '*.mlp.*'.",
        group=STATISTICS,
        metavar="GLOBS",
        default_text="none",
        bergson="index_cfg.filter_modules",
    )
    moe_experts: str | None = option(
        None,
        "Layers of experts to take in, a pair of linears for each expert: globs separated by "
        "commas, such as 'model.layers.*.mlp.experts'.",
        group=STATISTICS,
        metavar="GLOBS",
        default_text="none",
        bergson="index_cfg.moe_experts",
    )


@dataclass(frozen=True)
class _MachineOptions:
    """Where a run computes, and what it writes and prints."""

    token_batch_size: int = option(
        2048,
        "Tokens that one device takes in one step, padding included; lower it when memory "
        "runs out.",
        group=MACHINE,
        metavar="TOKENS",
        unit="tokens",
        minimum=2,
        default_text="2048 tokens per device",
        bergson="index_cfg.token_batch_size",
    )
    world_size: int | None = option(
        None,
        "Devices to use.",
        group=MACHINE,
        kind="integer",
        metavar="N",
        unit="devices",
        minimum=1,
        default_text="all devices",
    )
    fsdp: bool = option(
        False,
        "Spread the model's weights over the devices instead of copying them to each.",
        group=MACHINE,
        bergson="index_cfg.fsdp",
    )

    activations: str = option(
        "auto",
        "For the backward pass, store every layer's matrix products (faster) or recompute a layer "
        "from its input (leaner; known as activation checkpointing or rematerialization). auto: "
        "store if that takes at most half of the memory that model and factors leave free.",
        group=MACHINE,
        choices=("auto", "store", "recompute"),
    )
    module_partitions: int = option(
        1,
        "Fit the modules in so many groups, one after the other, each with passes of its own: "
        "fewer factors are in memory at a time. auto: as few groups as memory needs.",
        group=MACHINE,
        metavar="N",
        minimum=0,
        words={"auto": 0},
        default_text="1, all at once",
        bergson="hessian_cfg.module_partitions",
    )
    num_shards: int | None = option(
        None,
        "Files per factor on disk; bergson reads shards in as many processes.",
        group=OUTPUT,
        kind="integer",
        metavar="N",
        unit="files",
        minimum=1,
        default_text="the world size",
    )
    layout: Layout = option(
        "both",
        "File trees to write: bergson 2.5.1's, the older influence_results tree (seed), or "
        "both with shared files.",
        group=OUTPUT,
        choices=("both", "bergson", "seed"),
    )
    overwrite: bool = option(
        False,
        "Replace RUN_PATH if it exists.",
        group=OUTPUT,
        bergson="index_cfg.overwrite",
    )
    profile: bool = option(
        False,
        "After the summary, print each stage's seconds, arithmetic, share of the machine's peak "
        "and memory, and write them to profile.json.",
        group=OUTPUT,
    )
    profile_trace: str | None = option(
        None,
        "Write a trace of the run for XProf and Perfetto to this folder; take few tokens, since "
        "traces grow fast.",
        group=OUTPUT,
        metavar="DIR",
        default_text="none",
    )
    quiet: bool = option(
        False,
        "Print nothing but errors.",
        group=OUTPUT,
    )
    debug: bool = option(
        False,
        "Show the libraries' own messages, and a traceback with every error.",
        group=OUTPUT,
        bergson="index_cfg.debug",
    )


# A dataclass has its last base's fields first.
@dataclass(frozen=True)
class ComputeConfig(_MachineOptions, AutocorrelationOptions, _StatisticsOptions):
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
        from jhessians.validation import check_together

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
        from jhessians.provenance import read_options

        return cls.from_dict(read_options(path), where=str(path))
