"""The tools of scoring.py: their command lines, what they find, and where they leave scores."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import compare
import peers
from measure import RunFailed, Tool
from models import Shape

SPECIAL = ("tokens", "self")
HESSIAN = "hessian/kfac"
"""Where bergson's pipeline looks for factors below its run; ours lie in the run itself."""

DAMPING = "0.1"
"""Relative to the mean eigenvalue; kronfluence knows no other relative one."""


@dataclass(frozen=True)
class Fitted:
    """One shape, ready to be scored.

    Attributes:
        model: Its folder.
        documents: Data set to score.
        fits: Tool → folder of its fit; bergson takes jhessians'.
    """

    model: Path
    documents: Path
    fits: dict[str, Path]


@dataclass(frozen=True)
class Scorer:
    """A tool, what has to lie in its folder before, and where below it the scores are after."""

    tool: Tool
    prepare: Callable[[Path], None]
    scores: str


def queries_of(task: str) -> int:
    """How many queries a task has."""
    return {"tokens": 1, "self": 0}[task] if task in SPECIAL else int(task)


def gradient_bytes(shape: Shape) -> int:
    """A query's gradient in float32: every block's matrices."""
    return 4 * sum(each.inputs * each.out_features * each.layers for each in shape.linears)


def jhessians(
    options: argparse.Namespace, fitted: Fitted, task: str, queries: Path, at_once: int
) -> Scorer:
    """`jhessians score`, which takes model, precision and labels from the fit."""
    wanted = ["--self"] if task == "self" else ["--query", str(queries)]
    wanted += ["--attribute_tokens"] if task == "tokens" else []
    if at_once < queries_of(task):
        wanted += ["--query_batch_size", str(at_once)]
    command = [
        *(sys.executable, "-m", "jhessians", "score", "{out}", *wanted),
        *("--hessian", str(fitted.fits["jhessians"]), "--dataset", str(fitted.documents)),
        *("--token_batch_size", str(options.jhessians_batch), "--damping_factor", DAMPING),
    ]
    tool = Tool("jhessians", command, compare.jhessians_environment(), {}, {})
    return Scorer(tool, lambda out: None, ".")


def bergson(
    options: argparse.Namespace, fitted: Fitted, task: str, queries: Path, at_once: int
) -> Scorer:
    """The whole of `bergson ekfac` but for its fit: build the queries, apply, score."""
    if task == "tokens":
        # With a sum of queries, for otherwise it would attribute the query's tokens too.
        wanted = ["--attribute_tokens", "true", "--query.aggregation", "sum"]
    else:
        wanted = ["--query_batch_size", str(at_once)]
    command = [
        *(peers.python_of(options.peers_env), "-m", "bergson", "ekfac", "{out}"),
        *("--resume", "true", "--model", str(fitted.model), "--method", "kfac"),
        *("--hessian_cfg.ev_correction", "true", "--use_dataset_labels", "true"),
        *("--data.dataset", str(fitted.documents), "--data.truncation", "true"),
        *("--query.dataset", str(queries), "--query.truncation", "true", *wanted),
        *("--token_batch_size", str(options.bergson_batch)),
        *("--hessian_pipeline_cfg.inversion_cfg.damping_factor", DAMPING),
    ]
    return Scorer(
        Tool("bergson", command, {}, {}, {}),
        lambda out: _link(fitted.fits["jhessians"], out / HESSIAN),
        "scores",
    )


def kronfluence(
    options: argparse.Namespace, fitted: Fitted, task: str, queries: Path, at_once: int
) -> Scorer:
    """Pairwise or self scores with the factors of its own fit."""
    command = [
        *(peers.python_of(options.peers_env), str(compare.HERE / "peers.py"), "scores"),
        *(task if task in SPECIAL else "documents", str(fitted.model), str(fitted.documents)),
        *(str(queries), "{out}", str(options.kronfluence_batch), str(at_once)),
    ]
    name = "self" if task == "self" else "pairwise"
    factors = "fit/factors_ekfac"
    return Scorer(
        Tool("kronfluence", command, {}, {}, {}),
        lambda out: _link(fitted.fits["kronfluence"] / factors, out / factors),
        f"fit/scores_{name}/{name}_scores.safetensors",
    )


def scorers(
    options: argparse.Namespace, fitted: Fitted, task: str, queries: Path, at_once: int
) -> list[Scorer]:
    """jhessians first, then those peers that can do the task.

    Args:
        options: The command line's.
        fitted: What is scored.
        task: A number of queries, or one of `SPECIAL`.
        queries: Their data set.
        at_once: Queries whose gradients may lie in memory.
    """
    found = [jhessians(options, fitted, task, queries, at_once)]
    if "bergson" in options.peers and task != "self":
        found.append(bergson(options, fitted, task, queries, at_once))
    if "kronfluence" in options.peers:
        found.append(kronfluence(options, fitted, task, queries, at_once))
    return found


def _link(source: Path, target: Path) -> None:
    if not source.is_dir():
        # bergson would fit anew, without a word.
        raise RunFailed(f"no fit in {source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source, target_is_directory=True)
