"""`build`: the gradients of documents or tokens, in a store that torch bergson reads.

`config.py` holds its options, `pipeline.py` the work, `rows.py` what the rows are made with.
"""

from __future__ import annotations

from jhessians.commands.build.config import BuildConfig
from jhessians.commands.command import Command, Positional

DESCRIPTION = """\
Store the gradient of every document of a data set, or of every token, whole,
projected, or as a few outer products: an index or queries for torch bergson.
Labels are the data set's. Without --model and --dataset a small embedded demo
is used.
"""
EXAMPLES = """\
  jhessians build runs/demo-index --projection_dim 16
  jhessians build runs/index --model EleutherAI/pythia-160m \\
      --dataset NeelNanda/pile-10k --truncation --projection_dim 16
  jhessians build runs/query --model EleutherAI/pythia-160m \\
      --dataset queries.jsonl --aggregation mean
"""


def run(config: BuildConfig) -> str | None:
    """Build, and return the summary for a terminal; None where another host says it."""
    # jax and transformers take seconds to import: --help must not wait for them.
    from jhessians.commands.build.pipeline import build
    from jhessians.report.summary import render

    summary = build(config)
    return None if summary is None else render(summary)


BUILD = Command(
    name="build",
    summary="store the gradients of a data set's documents or tokens",
    usage="RUN_PATH [--model NAME --dataset NAME] [options]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=BuildConfig,
    positionals=(
        Positional(
            "run_path", "Folder to write; must not exist yet.", "jhessians build runs/index"
        ),
    ),
    run=run,
    replays=True,
    compiles=True,
)
