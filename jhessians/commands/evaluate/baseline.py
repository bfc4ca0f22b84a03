"""`evaluate baseline`: scores that know nothing of the model, in the form of all scores."""

from __future__ import annotations

import numpy as np
import yaml

from jhessians.commands.evaluate.config import BaselineConfig
from jhessians.commands.output import output_folder
from jhessians.commands.problem import read_inputs
from jhessians.commands.score.config import NONE, ScoreConfig
from jhessians.commands.score.results import Results, write_columns
from jhessians.commands.score.work import read_queries
from jhessians.config.provenance import CONFIG_FILE, config_document
from jhessians.config.replay import DATA
from jhessians.config.units import count_in_words
from jhessians.data.selecting import columns_of
from jhessians.devices.mesh import make_mesh
from jhessians.errors import ConfigError
from jhessians.evaluation.baselines import bm25, random_scores
from jhessians.report.progress import Progress


def baseline(config: BaselineConfig) -> str:
    """Write a baseline's scores.

    Args:
        config: Validated.

    Returns:
        What there is to say.

    Raises:
        UserError: If the data can't be read, or the result can't be written.
    """
    scored = (
        ScoreConfig(run_path=config.run_path) if config.like is None
        else ScoreConfig.from_yaml(config.like)
    )  # fmt: skip
    if scored.self or scored.query_tokens or scored.query_aggregation != NONE:
        raise ConfigError(
            f"{config.like} has columns that aren't queries (`self`, `query_tokens` or "
            "`query_aggregation`); expected scores of documents for whole queries"
        )
    run, one = scored.run, make_mesh(1)
    progress = Progress(quiet=config.quiet)
    directory = output_folder(config, "run_path", config.command)
    with directory as part:
        inputs = read_inputs(run, one, progress, token_batch_size=run.token_batch_size)
        documents = inputs.batches.documents
        queries = read_queries(scored, run, inputs, one)
        directory.contents = {
            DATA: documents.fingerprint(), "the queries": queries.fingerprint(),
        }  # fmt: skip
        texts = [inputs.text_of(documents, n) for n in range(len(documents))]
        asked = [inputs.text_of(queries, n) for n in range(len(queries))]
        with progress.stage("Scores"):
            if config.baseline == "bm25":
                scores = bm25(texts, asked)
            else:
                scores = random_scores(len(texts), len(asked), config.seed)
        columns = columns_of(queries, tokens=False)
        results = Results(
            part, documents, columns, tokens=False, parts=None, top=None, candidates=None
        )
        write_columns(part, columns, asked)
        numbers = np.arange(len(documents))
        results.add(numbers, scores, 0)
        results.finish(numbers, texts.__getitem__)
        options = {**scored.resolved_dict(), "run_path": config.run_path}
        document = config_document("score", options, None)
        document["jhessians"][config.command] = config.resolved_dict()
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        (part / CONFIG_FILE).write_text(text, encoding="utf-8")
    return (
        f"Scores by {config.baseline} of {count_in_words(len(texts), 'document')} for "
        f"{len(asked):,} queries are in {config.run_path}"
    )
