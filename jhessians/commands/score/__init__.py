"""`score`: which training documents made the model say what the queries say.

`config.py` holds its options; `hessian.py` reads the Hessian's run, `work.py` all else;
`pipeline.py` makes scores, `results.py` writes them as they come, and `listing.py` shows the
documents on top.
"""

from __future__ import annotations

from jhessians.commands.command import Command, Positional
from jhessians.commands.score.config import ScoreConfig

DESCRIPTION = """\
Score training documents by their influence on queries: the inner product of
each document's gradient with each query's, through the inverse of a Hessian that
jhessians compute or torch bergson fitted. Without more than OUT the embedded
demo is fitted and scored.
"""
EXAMPLES = """\
  jhessians score scores/demo
  jhessians score scores/pythia --hessian runs/pythia --query questions.jsonl \\
      --query_prompt_column prompt --query_completion_column completion
  jhessians score scores/self --hessian runs/pythia --self
"""


def run(config: ScoreConfig) -> str | None:
    """Score, write, and return what the terminal shows; None where another host says it."""
    # jax and transformers take seconds to import: --help must not wait for them.
    from jhessians.commands.score.pipeline import score

    return score(config)


SCORE = Command(
    name="score",
    summary="score training documents by their influence on queries",
    usage="OUT [--hessian RUN --query NAME] [options]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=ScoreConfig,
    positionals=(
        Positional("run_path", "Folder to write; must not exist yet.",
                   "jhessians score scores/demo"),
    ),
    run=run,
    replays=True,
    compiles=True,
)  # fmt: skip
