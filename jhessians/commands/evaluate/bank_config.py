"""Options of `evaluate bank`; no JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jhessians.config.inherited import prefixed, some_of
from jhessians.config.inputs import SOURCES, InputOptions
from jhessians.config.machine import MACHINE, ConsoleOptions, SavingOptions
from jhessians.config.option import check_tables, option
from jhessians.config.replay import Replayable
from jhessians.errors import ConfigError

TRAINING = "training"
SUBSETS = "subsets"
QUERIES = "queries"

_OF_DOCUMENTS = (
    "tokenizer", "dataset", "split", "subset", "prompt_column", "completion_column",
    "conversation_column", "truncation", "chunk_length", "max_tokens",
)  # fmt: skip
_DocumentOptions: Any = some_of("_DocumentOptions", InputOptions, _OF_DOCUMENTS)
_OF_QUERIES = ("split", "subset", "prompt_column", "completion_column", "conversation_column",
               "truncation")  # fmt: skip
_QueryOptions: Any = prefixed(
    "_QueryOptions", InputOptions, _OF_QUERIES,
    prefix="query_", group=QUERIES, what="Of the queries",
)  # fmt: skip


@dataclass(frozen=True)
class _ModelOptions:
    """What is trained, and what it is asked."""

    model_config: str | None = option(
        None,
        "config.json of the model, or a folder that holds it; its weights begin at random.",
        group=SOURCES, metavar="PATH", default_text="that of the embedded demo's smaller twin",
    )  # fmt: skip
    query: str | None = option(
        None, "Data set of the queries, in any form that --dataset takes.",
        group=QUERIES, metavar="NAME", default_text="the demo's questions",
    )  # fmt: skip


@dataclass(frozen=True)
class RecipeOptions:
    """How each model is trained."""

    epochs: int = option(
        15, "How often every document is seen.", group=TRAINING, metavar="N", unit="epochs",
        minimum=1,
    )  # fmt: skip
    learning_rate: float = option(
        3e-3, "The highest, of AdamW: a warm-up over a twentieth of the steps leads to it, a "
        "cosine down to zero.",
        group=TRAINING, metavar="X", minimum=0,
    )  # fmt: skip
    weight_decay: float = option(
        0.1, "Decoupled, of all parameters.", group=TRAINING, metavar="X", minimum=0
    )
    token_batch_size: int = option(
        1024, "Tokens of a batch, padding included.", group=TRAINING, metavar="TOKENS",
        unit="tokens", minimum=2,
    )  # fmt: skip
    seed: int = option(
        0, "Of the models' first parameters, of the documents' order, and of the subsets.",
        group=TRAINING, metavar="N", minimum=0,
    )  # fmt: skip


@dataclass(frozen=True)
class _SubsetOptions:
    """How many models, and on what."""

    models: int = option(
        100, "Models to train, each on documents of its own.", group=SUBSETS, metavar="M",
        unit="models", minimum=2,
    )  # fmt: skip
    share: float = option(
        0.5, "Of the documents, what a model is trained on.", group=SUBSETS, metavar="X",
        minimum=0, maximum=1,
    )  # fmt: skip
    models_at_once: int | None = option(
        None, "Models that a device trains side by side; devices share the models between them.",
        group=MACHINE, value_type="integer", metavar="N", unit="models", minimum=1,
        default_text="1 on a CPU, else 16",
    )  # fmt: skip
    world_size: int | None = option(
        None, "Devices to use.", group=MACHINE, value_type="integer", metavar="N",
        unit="devices", minimum=1, default_text="all devices",
    )  # fmt: skip


@dataclass(frozen=True)
class BankConfig(
    ConsoleOptions,
    SavingOptions,
    _SubsetOptions,
    RecipeOptions,
    _QueryOptions,
    _DocumentOptions,
    _ModelOptions,
    Replayable,
):
    """Everything that a bank depends on.

    Raises:
        ConfigError: If a value has the wrong type, or lies outside its choices or range.
    """

    run_path: str = ""

    command: ClassVar[str] = "evaluate bank"

    @property
    def is_demo(self) -> bool:
        """Whether the embedded demo's twin, documents and questions are taken."""
        return self.model_config is None

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return False

    def validate(self) -> None:
        """Check the options against each other.

        Raises:
            ConfigError: With one line: what clashes and what to change.
        """
        if not self.run_path.strip():
            raise ConfigError("RUN_PATH is empty; give the folder to write, such as runs/bank")
        check_tables(self)
        whole = ("model_config", "dataset", "query")
        given = [name for name in whole if getattr(self, name) is not None]
        if given and len(given) < len(whole):
            missing = next(name for name in whole if name not in given)
            raise ConfigError(
                f"--{given[0]} is given without --{missing}; give --model_config, --dataset and "
                "--query, or none of them for the embedded demo"
            )
        if self.is_demo and self.tokenizer is not None:
            raise ConfigError("--tokenizer says nothing about the embedded demo; leave it out")
        if not 0 < self.share < 1:
            raise ConfigError(
                f"--share {self.share:g} leaves no subset to draw; give a number between 0 and 1"
            )
        for prefix in ("", "query_"):
            names = [f"{prefix}{name}_column" for name in ("completion", "conversation")]
            if all(getattr(self, name) for name in names):
                raise ConfigError(f"--{names[0]} and --{names[1]} exclude each other; give one")
