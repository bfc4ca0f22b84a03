"""Options of `evaluate recall`, `lds`, `removal` and `baseline`; no JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jhessians.config.machine import MACHINE, OUTPUT, ConsoleOptions
from jhessians.config.option import check_tables, option, plain_dict
from jhessians.errors import ConfigError

MEASURE = "what is measured"
DEMO_BANK = "the embedded demo's"


@dataclass(frozen=True)
class _Measuring(ConsoleOptions):
    """What all measures of finished scores ask."""

    scores: str = ""

    json: str | None = option(
        None, "Also write the numbers, query by query, to this file.",
        group=OUTPUT, metavar="PATH", default_text="no file",
    )  # fmt: skip

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return False

    def validate(self) -> None:
        """Raise ConfigError unless the scores are named and the options make sense."""
        if not self.scores.strip():
            raise ConfigError("SCORES is empty; give the folder of finished scores")
        check_tables(self)
        if self.overwrite and self.json is None:
            raise ConfigError("--overwrite is given without --json; leave it out")


@dataclass(frozen=True)
class RecallConfig(_Measuring):
    """Options of `evaluate recall`."""

    relevant: str = option(
        "supporting",
        "Column of the queries' data set with the row numbers of the documents that are relevant "
        "to a query, counted from 0.",
        group=MEASURE, metavar="COLUMN",
    )  # fmt: skip
    query: str | None = option(
        None, "Data set of the queries, row by row those of the scores.",
        group=MEASURE, metavar="NAME", default_text="the one that was scored",
    )  # fmt: skip
    query_split: str | None = option(
        None, "Its split.",
        group=MEASURE, metavar="SPLIT", default_text="as it was scored, else train",
    )  # fmt: skip
    recall_at: tuple[str, ...] = option(
        ("1", "5", "10", "20"), "For which k to give recall@k.",
        group=MEASURE, value_type="list", metavar="K", default_text="1 5 10 20",
    )  # fmt: skip

    @property
    def cutoffs(self) -> list[int]:
        """The numbers of `recall_at`."""
        return [int(each) for each in self.recall_at]

    def validate(self) -> None:
        """Raise ConfigError unless the scores are named and the options make sense."""
        super().validate()
        _check_counts("recall_at", self.recall_at)
        if self.query_split is not None and self.query is None:
            raise ConfigError("--query_split is given without --query; give both, or neither")


@dataclass(frozen=True)
class _WithBank(_Measuring):
    bank: str | None = option(
        None, "Folder of a bank, made by jhessians evaluate bank.",
        group=MEASURE, metavar="BANK", default_text=DEMO_BANK,
    )  # fmt: skip


@dataclass(frozen=True)
class LdsConfig(_WithBank):
    """Options of `evaluate lds`."""

    against: str | None = option(
        None, "Other scores of the same documents and queries, to give the difference to.",
        group=MEASURE, metavar="SCORES", default_text="none",
    )  # fmt: skip


@dataclass(frozen=True)
class RemovalConfig(_WithBank):
    """Options of `evaluate removal`."""

    remove: tuple[str, ...] = option(
        ("1", "2", "4", "8", "16"), "How many documents to leave out.",
        group=MEASURE, value_type="list", metavar="K", default_text="1 2 4 8 16",
    )  # fmt: skip
    queries: int = option(
        8, "For so many queries, spread evenly over all: a model for each, and each K.",
        group=MEASURE, metavar="N", unit="queries", minimum=1,
    )  # fmt: skip
    random: int = option(
        5, "Models, for each K, that random documents are left out of.",
        group=MEASURE, metavar="N", unit="models", minimum=1,
    )  # fmt: skip
    seed: int = option(0, "Of the random documents.", group=MEASURE, metavar="N", minimum=0)
    models_at_once: int | None = option(
        None, "Models that a device trains side by side; devices share the models between them.",
        group=MACHINE, value_type="integer", metavar="N", unit="models", minimum=1,
        default_text="1 on a CPU, else 16",
    )  # fmt: skip

    @property
    def counts(self) -> list[int]:
        """The numbers of `remove`."""
        return [int(each) for each in self.remove]

    def validate(self) -> None:
        """Raise ConfigError unless the scores are named and the options make sense."""
        super().validate()
        _check_counts("remove", self.remove)


@dataclass(frozen=True)
class BaselineConfig(ConsoleOptions):
    """Options of `evaluate baseline`."""

    run_path: str = ""

    command: ClassVar[str] = "evaluate baseline"

    baseline: str = option(
        "bm25",
        "bm25: by the words that a document shares with the query. random: normal numbers. (Dot "
        "products and cosines of gradients are jhessians score with --hessian none.)",
        group=MEASURE, choices=("bm25", "random"),
    )  # fmt: skip
    like: str | None = option(
        None, "Finished scores of jhessians score: their documents and queries are taken.",
        group=MEASURE, metavar="SCORES", default_text="the embedded demo's",
    )  # fmt: skip
    seed: int = option(0, "Of random scores.", group=MEASURE, metavar="N", minimum=0)

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return False

    def validate(self) -> None:
        """Raise ConfigError unless the folder to write is named."""
        if not self.run_path.strip():
            raise ConfigError("RUN_PATH is empty; give the folder to write, such as scores/bm25")
        check_tables(self)

    def resolved_dict(self) -> dict[str, Any]:
        """Every option under its name, in plain YAML types."""
        return plain_dict(self)


def _check_counts(name: str, words: tuple[str, ...]) -> None:
    for word in words:
        if not word.isascii() or not word.isdigit() or not 0 < int(word) < 2**31:
            raise ConfigError(f"--{name} takes whole numbers above 0, got {word!r}")
