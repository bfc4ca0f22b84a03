"""What a finished run of `score` holds: its columns, its lists, every score, documents' texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jhessians.commands.score.config import ScoreConfig
from jhessians.commands.score.results import COLUMNS, TOP_FILE
from jhessians.config.replay import DATA, contents_of_run
from jhessians.errors import CheckpointError, DatasetError
from jhessians.files import parse_json, read_text
from jhessians.influence.ranking import Ranked, Ranking
from jhessians.interop.manifest import check_files
from jhessians.interop.score_store import ScoreStore


class Ends(NamedTuple):
    """Both ends of a query's ranking.

    Attributes:
        best: The highest scores first.
        worst: The lowest scores first.
    """

    best: list[Ranked]
    worst: list[Ranked]


def read_columns(folder: Path) -> list[str]:
    """What the columns of scores are about.

    Args:
        folder: Of the scores.

    Returns:
        Each column's text.

    Raises:
        CheckpointError: If the folder holds no finished scores, or is damaged.
    """
    return [str(line["text"]) for line in _lines(folder / COLUMNS, {"text"})]


def listed(folder: Path, query: int) -> tuple[Ends, dict[int, str]]:
    """What the lists say.

    Args:
        folder: Of the scores.
        query: The column.

    Returns:
        Both ends of the query's ranking; and the texts of all documents in any list, by number.

    Raises:
        CheckpointError: If there are no lists, or they are damaged.
    """
    texts, ends = dict[int, str](), Ends([], [])
    for line in _lines(folder / TOP_FILE, {*Ranked._fields, "text"}):
        place = Ranked(*(line[name] for name in Ranked._fields))
        texts[place.document] = line["text"]
        if place.query == query:
            (ends.best if place.rank > 0 else ends.worst).append(place)
    return ends, texts


def ranked(folder: Path, query: int, count: int) -> tuple[Ends, bool]:
    """Both ends of a query's ranking, of every score that is stored.

    Args:
        folder: Of the scores.
        query: The column.
        count: Documents at either end.

    Returns:
        The ends, with what scores of tokens add up to; and whether every document has a score.

    Raises:
        CheckpointError: If the scores are missing or damaged.
    """
    store = ScoreStore(folder)
    if query >= store.queries:
        raise CheckpointError(
            f"{folder} has scores for {store.queries} columns, but {COLUMNS} lists column {query}; "
            "make the scores again"
        )
    scores, written = store.read(query)
    if store.offsets is not None:
        whose = np.repeat(np.arange(store.documents), np.diff(store.offsets))
        scores = np.bincount(whose, scores.astype(np.float64), store.documents)
        written = np.bincount(whose[~written], minlength=store.documents) == 0
    numbers = np.arange(store.documents) if store.candidates is None else store.candidates
    ranking = Ranking(1, count)
    ranking.add(numbers[written], scores[written, None])
    ends = (
        [each._replace(query=query) for each in places]
        for places in (ranking.best(0), ranking.worst(0))
    )
    return Ends(*ends), bool(written.all())


def read_texts(folder: Path, numbers: Iterable[int]) -> dict[int, str]:
    """Texts of training documents, from the data set as it is now.

    Args:
        folder: Of the scores.
        numbers: Which documents.

    Returns:
        Number → text.

    Raises:
        UserError: If the data set, or what says which it was, is gone or has changed.
    """
    from jhessians.commands.problem import read_inputs
    from jhessians.devices.mesh import make_mesh
    from jhessians.report.progress import Progress

    run = ScoreConfig.from_yaml(folder).run
    scored = contents_of_run(folder).get(DATA)
    inputs = read_inputs(
        run, make_mesh(1), Progress(quiet=True), token_batch_size=run.token_batch_size
    )
    documents = inputs.batches.documents
    if documents.fingerprint() != scored:
        raise DatasetError(f"{inputs.dataset_name} is not what was scored: it changed since")
    return {number: inputs.text_of(documents, number) for number in numbers}


def _lines(path: Path, needed: set[str]) -> list[dict[str, Any]]:
    check_files(path.parent, {path.name}.__contains__)
    try:
        lines = [parse_json(line) for line in read_text(path).splitlines()]
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}); expected the folder of a finished run of "
            "jhessians score"
        ) from None
    except ValueError:
        lines = [None]
    if not all(isinstance(line, dict) and needed <= line.keys() for line in lines):
        raise CheckpointError(f"{path} is damaged; make the scores again") from None
    return lines
