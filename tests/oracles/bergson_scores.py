"""Influence scores of the real torch bergson on CPU: its `build` and `score`, of any Hessian.

`bergson.ekfac_scores` runs bergson's pipeline for factored Hessians from end to end; here the
queries' gradients are built and `score` itself inverts the Hessian, which it does for every kind:
factored, autocorrelation (projected), or none.

Precision: with `precision` fp64 gradients and products are float64, but bergson inverts and applies
every Hessian in float32 and rounds each module's part of a score to float32. A score is good to
about 1e-6 of its query's largest; without a Hessian to 1e-7.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.bergson import run_command
from tests.oracles.bergson_session import driver, session_folder

_numbers = itertools.count()


@dataclass(frozen=True)
class Columns:
    """Which columns of a jsonl file hold a document. Without a completion all tokens have loss."""

    prompt: str = "text"
    completion: str = ""
    conversation: str = ""

    @property
    def flags(self) -> list[str]:
        return [
            *("--prompt_column", self.prompt),
            *(["--completion_column", self.completion] if self.completion else []),
            *(["--conversation_column", self.conversation] if self.conversation else []),
        ]


@dataclass(frozen=True)
class Projection:
    """A random projection of gradients; dimension 0 for none."""

    dimension: int = 0
    kind: str = "rademacher"
    target: str = "per_module"
    scale: str = "jl"
    seed: int | None = None

    @property
    def flags(self) -> list[str]:
        """For `bergson.fit(extra=...)` too, which makes the autocorrelation of such gradients."""
        return [
            *("--projection_dim", str(self.dimension), "--projection_type", self.kind),
            *("--projection_target", self.target, "--projection_scale", self.scale),
            *([] if self.seed is None else ["--projection_seed", str(self.seed)]),
        ]


def scores(
    model_dir: str | Path,
    dataset: str | Path,
    query_dataset: str | Path,
    hessian: str | Path | None,
    *,
    inversion: str = "damped_inverse",
    damping_factor: float = 0.1,
    ev_correction: bool = True,
    aggregation: str = "none",
    unit_normalize: bool = False,
    columns: Columns | None = None,
    query_columns: Columns | None = None,
    projection: Projection | None = None,
    precision: str = "fp64",
    loss_reduction: str = "sum",
    include_bias: bool = False,
    token_batch_size: int = 128,
    attribute_tokens: bool = False,
    extra: Sequence[str] = (),
) -> np.ndarray:
    """Scores of documents for queries by `bergson build` and `bergson score`.

    Args:
        model_dir: Checkpoint folder with its tokenizer.
        dataset: Documents to score.
        query_dataset: Documents whose loss they influence.
        hessian: Folder of a factored Hessian of any number of shards, or of an autocorrelation's
            files; None for dot products of gradients.
        inversion, damping_factor, ev_correction: As bergson names them.
        aggregation: Of the queries, after inversion and normalisation: `none` for a column each,
            `mean` or `sum` for one column.
        unit_normalize: Cosine similarity: H^-1/2 on both sides, then both have length 1.
        columns, query_columns: Of the two files; `text`, or their own `input_ids`, if omitted.
        projection: Of both sides; that of the autocorrelation.
        precision: Of the model, and of the products.
        loss_reduction, include_bias, token_batch_size: As in `bergson.fit`.
        attribute_tokens: A row for each position that predicts a next one, documents one after the
            other, instead of a row for each document.
        extra: Further flags of both commands.

    Returns:
        [row, query], positive for a proponent; nan where bergson wrote nothing, which are documents
        under 2 tokens.

    Raises:
        BergsonUnavailable: bergson or torch is not installed.
        BergsonFailed: bergson raised.
    """
    run = session_folder() / "scores" / str(next(_numbers))
    run.parent.mkdir(exist_ok=True)
    shared = [
        *("--model", Path(model_dir).resolve()),
        *("--truncation", "--token_batch_size", token_batch_size),
        *("--loss_reduction", loss_reduction, "--include_bias", str(include_bias).lower()),
        *(projection or Projection()).flags,
        *extra,
    ]
    queries, rows = (Path(path).resolve() for path in (query_dataset, dataset))
    query_flags, flags = ((each or Columns()).flags for each in (query_columns, columns))
    run_command(
        [
            *("build", run / "query", *shared, "--precision", precision),
            *("--dataset", queries, *query_flags),
        ]
    )
    inverse: list[Any] = []
    if hessian is not None:
        inverse = [
            *("--hessian_path", Path(hessian).resolve(), "--inversion", inversion),
            *("--damping_factor", damping_factor),
            *("--ev_correction", str(ev_correction).lower()),
        ]
    run_command(
        [
            *("score", run / "scores", *shared, "--dataset", rows, *flags),
            *("--index_cfg.precision", precision, "--score_cfg.precision", "auto"),
            *("--query_path", run / "query"),
            *("--unit_normalize", str(unit_normalize).lower(), "--aggregation", aggregation),
            *("--attribute_tokens", str(attribute_tokens).lower(), *inverse),
        ]
    )
    result = run / "matrix.npy"
    driver().run("scores", scores=str(run / "scores"), result=str(result))
    matrix: np.ndarray = np.load(result)
    if aggregation != "none":
        # bergson 2.5.1 makes room for a column per query and writes the first one.
        assert np.isnan(matrix[:, 1:]).all()
        return matrix[:, :1]
    return matrix
