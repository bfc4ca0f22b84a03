"""`evaluate lds`: do scores predict what models lose that never saw some documents?"""

from __future__ import annotations

import numpy as np

from jhessians.commands.evaluate.config import LdsConfig
from jhessians.commands.evaluate.reading import (
    open_bank,
    read_scores,
    require_of_bank,
    require_writable,
    write_json,
)
from jhessians.evaluation.measures import linear_datamodeling_scores, mean_interval


def lds(config: LdsConfig) -> str:
    """Measure the linear datamodeling score.

    Args:
        config: Validated.

    Returns:
        Lines for a terminal.

    Raises:
        UserError: If scores or the bank can't be read, or don't fit each other.
    """
    require_writable(config.json, overwrite=config.overwrite)
    bank, where = open_bank(config.bank)

    def measured(folder: str) -> np.ndarray:
        scores = read_scores(folder)
        require_of_bank(folder, scores, bank, where)
        return linear_datamodeling_scores(scores, bank.subsets, bank.losses)

    values = measured(config.scores)
    means = {"LDS": mean_interval(values)}
    if config.against is not None:
        other = measured(config.against)
        means["LDS of the other"] = mean_interval(other)
        means["difference"] = mean_interval(values - other)
    models, documents = bank.subsets.shape
    lines = [
        f"{config.scores}: {documents:,} documents, {len(values):,} queries, {models:,} models; "
        "mean over queries [95 % interval, bootstrap]",
        *(f"  {name:<18}{each.render()}" for name, each in means.items()),
    ]
    if config.json is not None:
        content = {
            "scores": config.scores, "bank": str(where), "against": config.against,
            "means": {name: each._asdict() for name, each in means.items()},
            "queries": values.tolist(),
        }  # fmt: skip
        write_json(config.json, content, overwrite=config.overwrite)
    return "\n".join(lines)
