"""`evaluate removal`: train without the documents on top, and see what that costs the query."""

from __future__ import annotations

from functools import partial

import numpy as np

from jhessians.commands.evaluate.bank import open_experiment
from jhessians.commands.evaluate.config import RemovalConfig
from jhessians.commands.evaluate.reading import (
    open_bank,
    read_scores,
    require_of_bank,
    require_writable,
    write_json,
)
from jhessians.config.option import name_flags, options_of
from jhessians.config.units import seconds_in_words
from jhessians.devices.mesh import make_mesh
from jhessians.errors import ConfigError
from jhessians.evaluation.measures import mean_interval
from jhessians.evaluation.retraining import Retraining, models_at_once
from jhessians.report.progress import Progress


def removal(config: RemovalConfig) -> str:
    """Measure what the documents on top are worth, by training without them.

    Args:
        config: Validated.

    Returns:
        Lines for a terminal.

    Raises:
        UserError: If scores, bank or data can't be read, or don't fit each other.
    """
    require_writable(config.json, overwrite=config.overwrite)
    bank, where = open_bank(config.bank)
    scores = read_scores(config.scores)
    require_of_bank(config.scores, scores, bank, where)
    documents, queries = scores.shape
    if max(config.counts) >= documents:
        raise ConfigError(
            f"--remove {max(config.counts)} leaves nothing of {documents:,} documents; give fewer"
        )
    if config.queries > queries:
        raise ConfigError(f"--queries {config.queries} is more than there are; give {queries}")
    names = {each.name for each in options_of(type(config))}
    progress = Progress(quiet=config.quiet, reword=partial(name_flags, names=names))
    with progress.stage("Data"):
        experiment = open_experiment(where)
    chosen = np.linspace(0, queries - 1, config.queries).round().astype(int)
    weights, meant = _plan(config, scores, chosen)
    mesh = make_mesh(None)
    at_once = config.models_at_once or models_at_once(mesh)
    retraining = Retraining(experiment.training, experiment.queries, mesh, at_once)
    found = []
    with progress.stage("Models", len(weights), "models") as stage:
        for each in retraining.run(weights):
            found.append(each.losses)
            stage.advance(len(each.losses))
    # The model of all documents is trained here too: another machine rounds otherwise.
    rises = np.concatenate(found)[1:] - found[0][0]
    rows = []
    for count in config.counts:
        of_top = np.array([rises[row, query] for row, (k, query) in enumerate(meant)
                           if k == count and query >= 0])  # fmt: skip
        of_random = np.mean([rises[row, chosen] for row, (k, query) in enumerate(meant)
                             if k == count and query < 0], axis=0)  # fmt: skip
        rows.append((count, of_top, of_random))
    lines = [
        f"{config.scores}: rise of a query's loss, in nats, when the model is trained without "
        f"documents; mean of {len(chosen)} queries [95 % interval, bootstrap]",
        f"  {'left out':<10}{'the best':<26}random",
    ]
    for count, of_top, of_random in rows:
        ends = mean_interval(of_top).render(), mean_interval(of_random).render()
        lines.append(f"  {count:<10}{ends[0]:<26}{ends[1]}")
    seconds = seconds_in_words(sum(progress.timings.values()))
    lines.append(f"  {len(weights):,} models, {seconds}")
    if config.json is not None:
        content = {
            "scores": config.scores, "bank": str(where), "queries": chosen.tolist(),
            "rises": [{"removed": count, "best": of_top.tolist(), "random": of_random.tolist()}
                      for count, of_top, of_random in rows],
        }  # fmt: skip
        write_json(config.json, content, overwrite=config.overwrite)
    return "\n".join(lines)


def _plan(
    config: RemovalConfig, scores: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The documents' weights for every model, the first of which has all of them.

    Returns:
        The weights, and for each model but the first how many documents it lacks and the query
        whose best they are, or -1 for random ones.
    """
    documents = len(scores)
    order = np.argsort(-scores[:, chosen], axis=0, kind="stable")
    rng = np.random.default_rng(config.seed)
    left_out = [np.array([], int)]
    meant = []
    for count in config.counts:
        for place, query in enumerate(chosen):
            left_out.append(order[:count, place])
            meant.append((count, int(query)))
        for _ in range(config.random):
            left_out.append(rng.permutation(documents)[:count])
            meant.append((count, -1))
    weights = np.ones((len(left_out), documents))
    for row, numbers in enumerate(left_out):
        weights[row, numbers] = 0
    return weights, meant
