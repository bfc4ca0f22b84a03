"""`top`: browse the scores of a finished run, with the documents' texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jhessians.commands.command import Command, Positional
from jhessians.config.machine import ConsoleOptions
from jhessians.config.option import option
from jhessians.errors import CheckpointError, ConfigError
from jhessians.files import parse_json, read_text
from jhessians.interop.manifest import check_files

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
        CheckpointError: If the folder holds no lists, or they are damaged.
        ConfigError: If there is no such query.
    """
    from jhessians.commands.score.listing import ranking_lines
    from jhessians.influence.ranking import Ranked

    folder = Path(config.scores)
    columns = _lines(folder / "columns.jsonl")
    if config.query >= len(columns):
        raise ConfigError(
            f"--query {config.query} is given, but {folder} has {len(columns)} columns of scores; "
            f"give 0 to {len(columns) - 1}"
        )
    texts, best, worst = dict[int, str](), list[Ranked](), list[Ranked]()
    places = _lines(folder / "top.jsonl")
    try:
        for line in places:
            if line["query"] == config.query:
                texts[line["document"]] = line["text"]
                place = Ranked(*(line[name] for name in Ranked._fields))
                (best if place.rank > 0 else worst).append(place)
        lines = ranking_lines(columns[config.query]["text"], best[: config.n], worst[: config.n],
                              texts.__getitem__)  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _damaged(folder) from None
    if config.n > len(best):
        lines.append(f"  {folder} lists {len(best)} documents at either end; --top K lists more")
    return "\n".join(lines)


def _lines(path: Path) -> list[dict[str, Any]]:
    check_files(path.parent, {path.name}.__contains__)
    try:
        lines = [parse_json(line) for line in read_text(path).splitlines()]
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}); expected the folder of a finished run of "
            "jhessians score"
        ) from None
    except ValueError:
        raise _damaged(path) from None
    if not all(isinstance(line, dict) for line in lines):
        raise _damaged(path)
    return lines


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged; make the scores again")


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
