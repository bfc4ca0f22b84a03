"""Options of a `build` run; names and meanings are those of `bergson build` where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jhessians.config.inputs import InputOptions
from jhessians.config.machine import (
    MACHINE,
    ConsoleOptions,
    DeviceOptions,
    HostOptions,
    SavingOptions,
)
from jhessians.config.numbers import (
    NUMBERS,
    PRECISIONS,
    PrecisionOptions,
    require_float32_products,
)
from jhessians.config.option import check_tables, option, options_of, reworded
from jhessians.config.provenance import bergson_places, config_document
from jhessians.config.replay import Replayable
from jhessians.config.statistics import GradientOptions
from jhessians.errors import ConfigError
from jhessians.methods.autocorrelation_options import AutocorrelationOptions

ROWS = "rows"

_RowOptions: Any = reworded(
    AutocorrelationOptions,
    ROWS,
    projection_target="Columns for each module, or one projection of all modules' gradients.",
    attribute_tokens="A row for each token that predicts a next one, instead of each document.",
    split_attention_modules="Modules to split into heads, each with columns of its own: names or "
    "globs.",
    optimizer_state="Take the normalizers from a training run: torch's optimizer.pt, or an Orbax "
    "checkpoint of an optax state.",
)


@dataclass(frozen=True)
class StoreOptions:
    """What is stored of the gradients."""

    processor_path: str | None = option(
        None,
        "Make rows as the gradient processor in this folder says, such as an autocorrelation "
        "Hessian's: with its normalizers, its projection, and biases if it has them.",
        group=ROWS, metavar="PATH", default_text="none",
    )  # fmt: skip
    unit_normalize: bool = option(
        False, "Scale every row to unit length, over all modules.",
        group=ROWS, bergson="preprocess_cfg.unit_normalize",
    )  # fmt: skip
    aggregation: str = option(
        "none", "Store one row: the mean over all documents, or the sum.",
        group=ROWS, choices=("none", "mean", "sum"), bergson="preprocess_cfg.aggregation",
    )  # fmt: skip
    rank: int = option(
        0,
        "Store each document's gradient as so many outer products for each module, the largest "
        "ones, in a format of our own.",
        group=ROWS, metavar="R", minimum=0, default_text="0, all of the gradient",
    )  # fmt: skip
    store_dtype: str | None = option(
        None, "Number format of what is stored.",
        group=NUMBERS, choices=PRECISIONS,
        default_text="that of --precision as in bergson, or fp32 with --aggregation",
    )  # fmt: skip
    max_batch_size: int | None = option(
        None, "Documents that a device takes in one step, at most.",
        group=MACHINE, value_type="integer", metavar="N", unit="documents", minimum=1,
        default_text="as many as memory allows", bergson="index_cfg.max_batch_size",
    )  # fmt: skip


# A dataclass has its last base's fields first.
@dataclass(frozen=True)
class BuildConfig(
    ConsoleOptions,
    SavingOptions,
    HostOptions,
    DeviceOptions,
    StoreOptions,
    _RowOptions,
    GradientOptions,
    PrecisionOptions,
    InputOptions,
    Replayable,
):
    """Everything that a `build` run depends on.

    Values are checked on construction; `validate` checks how they go together.

    Raises:
        ConfigError: If a value has the wrong type, or lies outside its choices or range.
    """

    command: ClassVar[str] = "build"

    @property
    def stored_as(self) -> str:
        """The number format of the store, whichever way it was chosen."""
        return self.store_dtype or ("fp32" if self.aggregation != "none" else self.precision)

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return "fp64" in (self.precision, self.stored_as)

    def validate(self) -> None:
        """Check the options against each other.

        Raises:
            ConfigError: With one line: what clashes and what to change.
        """
        check_tables(self)
        if self.needs_float64:  # products of fp32 models, too, are then in 64 bits
            require_float32_products(self.matmul_precision, "store_dtype", self.stored_as, ())
        _check_rows(self)
        if self.chunk_length > self.token_batch_size:
            raise ConfigError(
                f"--chunk_length {self.chunk_length} exceeds "
                f"--token_batch_size {self.token_batch_size}; raise the one or lower the other"
            )

    def bergson_step(self, *, model: str, dataset: str) -> dict[str, Any]:
        """The run as a `build` step of bergson 2.5.1, in plain YAML types.

        Args:
            model: Name or folder of the model that was used, the demo's too.
            dataset: The same for the data set.

        Returns:
            `{"build": {"index_cfg": …, "preprocess_cfg": …}}`.
        """
        values = self.resolved_dict() | {
            "model": model,
            "dataset": dataset,
            # bergson writes "the model's own" as an empty name.
            "tokenizer": self.tokenizer or "",
            "optimizer_state": self.optimizer_state or "",
            "moe_experts": self.moe_experts or "",
            # Its own default, which only heads that are split would mind.
            "head_dim": self.head_dim if self.split_attention_modules else 0,
        }
        step = bergson_places(options_of(type(self)), values)
        return {"build": step | {"index_cfg": {"run_path": self.run_path, **step["index_cfg"]}}}

    def document(self, *, devices: Sequence[str] = (), **names: Any) -> dict[str, Any]:
        """All of config.yaml.

        Args:
            devices: See `run_metadata`.
            names: Arguments of `bergson_step`.

        Returns:
            Nested tables, in plain YAML types.
        """
        step = self.bergson_step(**names)
        return config_document("build", self.resolved_dict(), step, devices=devices)


def _check_rows(config: BuildConfig) -> None:
    if config.attribute_tokens:
        if config.aggregation != "none":
            raise ConfigError(
                f"--aggregation {config.aggregation} leaves one row, while --attribute_tokens "
                "wants one of every token; leave one of them out"
            )
        if config.moe_experts:
            raise ConfigError(
                "--attribute_tokens wants a gradient from every token, but an expert of "
                "--moe_experts reads only some; leave one of them out"
            )
    if config.rank:
        clashes = {
            "projection_dim": (config.projection_dim > 0, "makes rows that are short already"),
            "attribute_tokens": (config.attribute_tokens, "makes rows of rank one"),
            "aggregation": (config.aggregation != "none", "adds up documents to any rank"),
            "normalizer": (config.normalizer == "adam", "adam scales every entry, to any rank"),
        }
        for name, (given, does) in clashes.items():
            if given:
                raise ConfigError(
                    f"--rank {config.rank} keeps a few outer products of a document's gradient, "
                    f"while --{name} {does}; leave one of them out"
                )
    if config.processor_path is not None:
        for name in ("normalizer", "optimizer_state"):
            if getattr(config, name) not in ("none", None):
                raise ConfigError(
                    f"--{name} makes normalizers, while --processor_path has its own; give one"
                )
