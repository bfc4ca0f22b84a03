"""`evaluate recall`: do scores find the documents that are known to be relevant?"""

from __future__ import annotations

from jhessians.commands.evaluate.config import RecallConfig
from jhessians.commands.evaluate.reading import (
    read_scores,
    relevant_documents,
    require_writable,
    write_json,
)
from jhessians.config.units import count_in_words
from jhessians.evaluation.measures import mean_interval, retrieval


def recall(config: RecallConfig) -> str:
    """Measure retrieval.

    Args:
        config: Validated.

    Returns:
        Lines for a terminal.

    Raises:
        UserError: If scores or relevant documents can't be read, or don't fit each other.
    """
    require_writable(config.json, overwrite=config.overwrite)
    scores = read_scores(config.scores)
    relevant = relevant_documents(
        config.scores, config.relevant, config.query, config.query_split, scores.shape
    )
    values = retrieval(scores, relevant, config.cutoffs)
    means = {name: mean_interval(each) for name, each in values.items()}
    documents, queries = scores.shape
    lines = [
        f"{config.scores}: {count_in_words(documents, 'document')}, {queries:,} queries; mean over "
        "queries [95 % interval, bootstrap]",
        *(f"  {name:<14}{each.render()}" for name, each in means.items()),
    ]
    if config.json is not None:
        content = {
            "scores": config.scores,
            "means": {name: each._asdict() for name, each in means.items()},
            "queries": {name: each.tolist() for name, each in values.items()},
        }
        write_json(config.json, content, overwrite=config.overwrite)
    return "\n".join(lines)
