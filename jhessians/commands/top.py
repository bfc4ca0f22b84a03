"""`top`: browse the scores of a finished run, with the documents' texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jhessians.commands.command import Command, Positional
from jhessians.config.machine import ConsoleOptions
from jhessians.config.option import option
from jhessians.errors import ConfigError, UserError

SHOWN = "what is shown"


@dataclass(frozen=True)
class TopConfig(ConsoleOptions):
    """Options of `top`."""

    scores: str = ""

    query: int = option(
        0, "Column of the scores: the number of the query.", group=SHOWN, metavar="N", minimum=0
    )
    n: int = option(
        20, "Documents at either end of the ranking.",
        group=SHOWN, metavar="N", unit="documents", minimum=1,
    )  # fmt: skip

    def validate(self) -> None:
        """Raise ConfigError unless the folder is named."""
        if not self.scores.strip():
            raise ConfigError("SCORES is empty; give the folder of a finished score run")
        if self.overwrite:
            raise ConfigError("--overwrite says nothing to top, which writes nothing; leave it out")

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return False


def top(config: TopConfig) -> str:
    """The documents at both ends of one query's ranking.

    Returns:
        Lines for a terminal.

    Raises:
        CheckpointError: If the folder holds no scores, or they are damaged.
        ConfigError: If there is no such query.
    """
    from jhessians.commands.score.listing import ranking_lines
    from jhessians.commands.score.stored import listed, ranked, read_columns, read_texts

    folder, notes = Path(config.scores), []
    columns = read_columns(folder)
    if config.query >= len(columns):
        raise ConfigError(
            f"--query {config.query} is given, but {folder} has {len(columns)} columns of scores; "
            f"give 0 to {len(columns) - 1}"
        )
    ends, texts = listed(folder, config.query)
    if config.n > len(ends.best):
        found, whole = ranked(folder, config.query, config.n)
        if whole:
            ends = found
        else:
            notes.append(f"{folder} holds {len(ends.best)} documents at either end, as --top said")
    best, worst = ends.best[: config.n], ends.worst[: config.n]
    shown = {each.document for each in best}
    worst = [each for each in worst if each.document not in shown]
    shown |= {each.document for each in worst}
    if unknown := shown - texts.keys():
        try:
            texts |= read_texts(folder, unknown)
        except UserError as error:
            notes.append(f"{len(unknown)} documents are shown without texts: {error}")
    lines = ranking_lines(columns[config.query], best, worst, lambda n: texts.get(n, ""))
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


DESCRIPTION = """\
Show the documents that help and that harm a query most, from a finished run of
jhessians score: rank, score, number and text, a line each.
"""
EXAMPLES = """\
  jhessians top scores/demo
  jhessians top scores/demo --query 7 -n 5
"""

TOP = Command(
    name="top",
    summary="browse the scores of a finished run",
    usage="SCORES [--query N] [-n N]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=TopConfig,
    positionals=(
        Positional("scores", "Folder that jhessians score wrote.", "jhessians top scores/demo"),
    ),
    run=top,
    shows=True,
)
