"""What measures read: scores of documents, and what they are scores of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jhessians import demo
from jhessians.commands.score.config import ScoreConfig
from jhessians.config.provenance import CONFIG_FILE
from jhessians.config.replay import DATA, contents_of_run
from jhessians.errors import CheckpointError, ConfigError, DatasetError, OutputError
from jhessians.evaluation.bank import Bank
from jhessians.files import read_yaml
from jhessians.interop.rundir import output_error
from jhessians.interop.score_store import ScoreStore


def read_scores(folder: str | Path) -> np.ndarray:
    """Scores of all documents, made here or by bergson, higher for what helps more.

    Args:
        folder: That of finished scores.

    Returns:
        [document, query]; where tokens have scores, what they add up to.

    Raises:
        CheckpointError: If they can't be read, or some documents have none.
    """
    store = ScoreStore(folder)
    if store.candidates is not None or not store.complete:
        raise CheckpointError(
            f"{folder} lacks the scores of some documents; expected those of all: score without "
            "`top` and `candidates`"
        )
    scores = store.read_all()
    if store.offsets is not None:
        whose = np.repeat(np.arange(store.documents), np.diff(store.offsets))
        sums = np.zeros((store.documents, store.queries))
        np.add.at(sums, whose, scores)
        scores = sums
    return scores if _higher_is_better(Path(folder)) else -scores


def _higher_is_better(folder: Path) -> bool:
    """What the config beside the scores says, as bergson writes it; yes if it says nothing."""
    try:
        document = read_yaml(folder / CONFIG_FILE)
        steps = document["steps"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return True
    for step in steps if isinstance(steps, list) else []:
        for part in step.values() if isinstance(step, Mapping) else []:
            found = part.get("score_cfg") if isinstance(part, Mapping) else None
            if isinstance(found, Mapping) and isinstance(found.get("higher_is_better"), bool):
                return bool(found["higher_is_better"])
    return True


def open_bank(path: str | None) -> tuple[Bank, Path]:
    """A bank, and where it is.

    Args:
        path: Its folder; None for the demo's.

    Returns:
        The bank's numbers, and the folder.
    """
    folder = Path(str(demo.BANK)) if path is None else Path(path)
    return Bank.load(folder), folder


def require_of_bank(folder: str | Path, scores: np.ndarray, bank: Bank, where: Path) -> None:
    """Check that scores are of a bank's documents and queries.

    Args:
        folder: Of the scores.
        scores: [document, query].
        bank: The bank.
        where: Its folder.

    Raises:
        CheckpointError: If they are of others.
    """
    documents, queries = bank.subsets.shape[1], bank.losses.shape[1]
    if scores.shape != (documents, queries):
        raise CheckpointError(
            f"{folder} has scores of {len(scores):,} documents for {scores.shape[1]:,} queries; "
            f"expected the {documents:,} and {queries:,} of {where}: score those"
        )
    known = contents_of_run(Path(folder))
    for name, there in ((DATA, bank.contents.documents), ("the queries", bank.contents.queries)):
        if known.get(name, there) != there:
            raise CheckpointError(
                f"{name} of {folder} is not what the models of {where} saw; score the same, with "
                "the same tokenizer"
            )


def relevant_documents(
    folder: str | Path, column: str, query: str | None, split: str | None, shape: tuple[int, int]
) -> list[list[int]]:
    """Which documents are relevant to each query, as the queries' data set says.

    Args:
        folder: Of the scores.
        column: That has their numbers.
        query: The data set; None for the one that was scored.
        split: Of it; None as it was scored.
        shape: How many documents and queries have scores.

    Returns:
        Numbers of documents, a list for each query.

    Raises:
        ConfigError: If the data set isn't known.
        DatasetError: If it doesn't say what is needed.
    """
    from jhessians.data.rows import open_rows

    subset: str | None = None
    if query is None:
        scored = _config_of(folder)
        query = str(demo.QUESTIONS) if scored.query is None else scored.query
        split, subset = scored.query_split, scored.query_subset
    rows = open_rows(query, split=split or "train", subset=subset)
    if column not in rows.column_names:
        raise DatasetError(
            f"{query} has no column {column!r}; its columns are {', '.join(rows.column_names)}; "
            "name one with `relevant`"
        )
    documents, queries = shape
    if len(rows) != queries:
        raise DatasetError(
            f"{query} has {len(rows):,} rows, but {folder} has scores for {queries:,} queries; "
            "give the queries that were scored, one by one"
        )
    found = list(rows[column])
    for number, numbers in enumerate(found):
        fine = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers)
        if not fine or not all(type(n) is int and 0 <= n < documents for n in numbers):
            raise DatasetError(
                f"row {number} of {query} has {str(numbers)[:60]!r} in {column!r}; expected a list "
                f"of row numbers of documents, from 0 to {documents - 1}"
            )
    return [sorted(set(numbers)) for numbers in found]


def _config_of(folder: str | Path) -> ScoreConfig:
    try:
        return ScoreConfig.from_yaml(folder)
    except ConfigError as error:
        raise ConfigError(f"{error}, or name the queries' data set with `query`") from None


def write_json(path: str, content: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write a file of numbers, whole or not at all.

    Args:
        path: The file.
        content: What it says.
        overwrite: Whether it may replace another.

    Raises:
        OutputError: If there is one that it mustn't replace, or it can't be written.
    """
    target = Path(path)
    require_writable(path, overwrite=overwrite)
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise output_error(error, target) from error


def require_writable(path: str | None, *, overwrite: bool) -> None:
    """Check, before any work, that a file of numbers is welcome.

    Args:
        path: The file; None if none is wanted.
        overwrite: Whether it may replace another.

    Raises:
        OutputError: If it isn't.
    """
    if path is None:
        return
    if not Path(path).name or Path(path).is_dir():
        raise OutputError(f"{path} is a folder; expected a file's name; choose another path")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(
            f"{path} exists already; expected a new path; pass `overwrite` to replace it or choose "
            "another"
        )
