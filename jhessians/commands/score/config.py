"""Options of `score`; what is not given is as in the Hessian's run. No JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.score.hessian import options_of_run
from jhessians.commands.score.refinement_options import (
    NONE,
    REFINEMENT,
    DescentOptions,
    RefinementOptions,
    check_refinement,
)
from jhessians.config.inherited import given, inherited, names_of, prefixed, some_of
from jhessians.config.inputs import InputOptions
from jhessians.config.inversion import InversionOptions
from jhessians.config.machine import (
    MACHINE,
    ConsoleOptions,
    DeviceOptions,
    HostOptions,
    MachineOptions,
    ProfileOptions,
    SavingOptions,
)
from jhessians.config.numbers import NumberOptions
from jhessians.config.option import check_tables, option, options_of
from jhessians.config.replay import Replayable
from jhessians.config.statistics import StatisticsOptions
from jhessians.errors import ConfigError

QUERIES = "queries"
SCORES = "scores"
RUNS = "the Hessian's run"

_OF_THE_RUN = (
    "model", "revision", "tokenizer", "dataset", "split", "subset", "prompt_column",
    "completion_column", "conversation_column", "truncation", "chunk_length", "max_tokens",
    "precision", "matmul_precision", "loss_fn", "label_smoothing", "loss_reduction", "modules",
    "filter_modules", "moe_experts", "include_bias", "token_batch_size", "fsdp", "activations",
)  # fmt: skip
_RunOptions: Any = inherited(
    "_RunOptions", (InputOptions, NumberOptions, StatisticsOptions, MachineOptions), _OF_THE_RUN,
    source=RUNS,
)  # fmt: skip
_Devices: Any = some_of("_Devices", DeviceOptions, ("world_size", "mesh"))
OF_QUERIES = ("split", "subset", "prompt_column", "completion_column", "conversation_column",
              "truncation")  # fmt: skip
_QueryOptions: Any = prefixed(
    "_QueryOptions", InputOptions, OF_QUERIES,
    prefix="query_", group=QUERIES, what="Of the queries",
)  # fmt: skip


@dataclass(frozen=True)
class _ScoreOptions:
    """What is scored, and how scores are divided and stored."""

    by_module: str | None = option(
        None,
        "Keep apart what each module, or each layer, adds to a score, in module_scores.npy.",
        group=SCORES, choices=("module", "layer"), default_text="no",
    )  # fmt: skip
    attribute_tokens: bool = option(
        False, "Give every token of the training data a score, not only every document.",
        group=SCORES,
    )  # fmt: skip
    self: bool = option(
        False,
        "Without queries: each document's influence on itself, gᵀ H⁻¹ g, as the one column of "
        "scores.",
        group=SCORES,
    )  # fmt: skip
    normalize: str = option(
        NONE,
        "Divide each document's scores by its self-influence (self) or by the root of that "
        "(root_self), lest documents with large gradients come first everywhere.",
        group=SCORES, choices=(NONE, "self", "root_self"),
    )  # fmt: skip
    unit_normalize: bool = option(
        False,
        "Cosines: divide by the roots of the document's and of the query's self-influence.",
        group=SCORES,
    )  # fmt: skip
    top: int | None = option(
        None,
        "Store only the best and the worst K documents of each query, for data sets of any size.",
        group=SCORES, value_type="integer", metavar="K", unit="documents", minimum=1,
        default_text="all scores, and lists of 20",
    )  # fmt: skip
    candidates: str | None = option(
        None,
        "Score only the documents that are among the best --top K of any query in these earlier "
        "scores.",
        group=SCORES, metavar="SCORES", default_text="all documents",
    )  # fmt: skip


@dataclass(frozen=True)
class _QuerySetOptions:
    """Which queries, and in which form they are kept."""

    hessian: str | None = option(
        None,
        "Folder of a Hessian: a run of jhessians compute or of bergson, or none for plain inner "
        "products.",
        group="what to run on", metavar="RUN",
        default_text="the demo's, fitted first",
    )  # fmt: skip
    query: str | None = option(
        None,
        "Data set of the queries, in any form that --dataset takes.",
        group=QUERIES, metavar="NAME", default_text="the demo's questions",
    )  # fmt: skip
    query_aggregation: str = option(
        NONE, "Add the queries' gradients up, or average them, to one query.",
        group=QUERIES, choices=(NONE, "mean", "sum"),
    )  # fmt: skip
    query_tokens: bool = option(
        False, "Give every token of a query a score of its own: a column for each.",
        group=QUERIES,
    )  # fmt: skip
    query_rank: int | None = option(
        None,
        "Keep each query, after the inverse, as so many outer products per module: less memory, "
        "and scores of tokens that cost little; what that keeps of its length is printed.",
        group=QUERIES, value_type="integer", metavar="R", minimum=1, default_text="whole",
    )  # fmt: skip
    query_batch_size: int | None = option(
        None,
        "Queries that are in memory together, for each of which groups there is a pass over the "
        "training data.",
        group=MACHINE, value_type="integer", metavar="N", unit="queries", minimum=1,
        default_text="as many as half of the free memory holds",
    )  # fmt: skip


@dataclass(frozen=True)
class ScoreConfig(
    ConsoleOptions,
    SavingOptions,
    HostOptions,
    ProfileOptions,
    _Devices,
    _RunOptions,
    InversionOptions,
    RefinementOptions,
    DescentOptions,
    _ScoreOptions,
    _QueryOptions,
    _QuerySetOptions,
    Replayable,
):
    """Everything that `score` depends on, besides what the Hessian's run says.

    Raises:
        ConfigError: If a value has the wrong type, or lies outside its choices or range.
    """

    run_path: str = ""

    command: ClassVar[str] = "score"

    @property
    def is_demo(self) -> bool:
        """Whether model and data are the embedded demo's, for want of others."""
        return self.hessian is None and self.model is None and self.dataset is None

    @property
    def has_hessian(self) -> bool:
        """Whether scores go through the inverse of a Hessian."""
        return self.hessian != NONE

    @property
    def run(self) -> ComputeConfig:
        """The Hessian's run with what is given here instead: what to compute, on which data."""
        options: dict[str, Any] = {}
        if self.has_hessian and self.hessian is not None:
            options = options_of_run(self.hessian)
        if self.model is not None:
            options.pop("revision", None)  # the other model's
        options |= given(self, _OF_THE_RUN)
        options |= {"fisher_type": None, "use_dataset_labels": True, "mc_samples": 1,
                    "world_size": self.world_size, "mesh": self.mesh, "run_path": self.run_path,
                    "profile_trace": self.profile_trace}  # fmt: skip
        return ComputeConfig.from_dict(options, where=f"{self.hessian or 'the command line'}")

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return self.run.precision == "fp64"

    def validate(self) -> None:
        """Check the options against each other.

        Raises:
            ConfigError: With one line: what clashes and what to change.
        """
        if not self.run_path.strip():
            raise ConfigError("RUN_PATH is empty; give the folder to write, such as scores/demo")
        check_tables(self)
        if self.hessian is None and not self.is_demo:
            raise ConfigError(
                "--model or --dataset is given without --hessian; give a run's folder, or "
                "--hessian none for plain inner products"
            )
        if self.is_demo and self.query is not None:
            raise ConfigError(
                "--query is given without --hessian; give a run's folder, or --hessian none with "
                "--model and --dataset"
            )
        run = self.run
        run.validate()
        _check_queries(self, is_demo=run.is_demo)
        check_refinement(self, loss=run.loss_fn)


def _check_queries(config: ScoreConfig, *, is_demo: bool) -> None:
    """Refuse queries that contradict each other, or what they are scored for.

    Raises:
        ConfigError: The first clash found.
    """
    if config.self:
        names = [each.name for each in options_of(_QuerySetOptions)] + list(names_of(_QueryOptions))
        apart = {"hessian", "world_size", "mesh"}
        for each in options_of(type(config)):
            if each.name in names and each.name not in apart:
                if getattr(config, each.name) != each.default:
                    raise ConfigError(
                        f"--self scores documents for themselves and has no queries; leave "
                        f"--{each.name} out"
                    )
        for name in ("normalize", "unit_normalize", "attribute_tokens"):
            if getattr(config, name) not in (False, NONE):
                raise ConfigError(f"--self and --{name} exclude each other; give one")
    elif config.query is None and not is_demo:
        raise ConfigError("--query is missing; give the queries' data set, or --self for none")
    if not config.has_hessian:
        for each in (*options_of(InversionOptions), *REFINEMENT):
            if getattr(config, each.name) != each.default:
                raise ConfigError(
                    f"--{each.name} is about a Hessian's inverse, but --hessian is none; leave it "
                    "out or give a run"
                )
    if config.unit_normalize and config.normalize != NONE:
        raise ConfigError("--unit_normalize and --normalize exclude each other; give one")
    if config.query_tokens and config.query_aggregation != NONE:
        raise ConfigError(
            "--query_tokens keeps tokens apart that --query_aggregation adds up; give one"
        )
    if config.attribute_tokens:
        for name, clashes in (("by_module", config.by_module), ("top", config.top)):
            if clashes:
                raise ConfigError(f"--{name} is for documents' scores; leave it or "
                                  "--attribute_tokens out")  # fmt: skip
        if config.normalize != NONE or config.unit_normalize:
            raise ConfigError(
                "--attribute_tokens gives tokens' shares of a document's score, which is divided "
                "by nothing; leave --normalize and --unit_normalize out"
            )
        if config.moe_experts:
            raise ConfigError(
                "--attribute_tokens wants a score of every token, but an expert of --moe_experts "
                "reads only some; leave one of them out"
            )
    if config.top and config.by_module:
        raise ConfigError("--top and --by_module exclude each other; give one")
    if config.candidates is not None and config.top is None:
        raise ConfigError("--candidates is given without --top; say how many per query, --top 100")
    if config.query_completion_column and config.query_conversation_column:
        raise ConfigError(
            "--query_completion_column and --query_conversation_column exclude each other; give one"
        )
