"""Documents at the top and the bottom of queries' rankings, as a terminal shows them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jhessians.influence.ranking import Ranked

QUERIES_SHOWN = 3
RESIDUALS_SHOWN = 20
HELPFUL, HARMFUL = 5, 2
WIDTH = 80


def ranking_lines(title: str, best: Iterable[Ranked], worst: Iterable[Ranked],
                  text_of: Callable[[int], str]) -> list[str]:  # fmt: skip
    """One query's documents, a line each, with rank, score and number.

    Args:
        title: The query's own text.
        best: The most helpful ones.
        worst: The most harmful ones.
        text_of: A document's text, by its number.

    Returns:
        Lines of at most 80 columns.
    """
    lines = [f"  {shortened(title, WIDTH - 2)}"]
    for each in [*best, *sorted(worst, key=lambda each: each.rank)]:
        before = f"    {each.rank:>3}  {each.score:>10.4g}  #{each.document:<6} "
        lines.append(before + shortened(text_of(each.document), WIDTH - len(before)))
    return lines


def residual_lines(refinement: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far each query's residual fell, a line each for the first `RESIDUALS_SHOWN`, and for all.

    Args:
        refinement: A line each, as in the results' file.

    Returns:
        Lines for the terminal.
    """
    pairs = np.array([(each["residuals"][0], each["residual"]) for each in refinement], float)
    lines = ["  Residuals |q - (G + D) x| / |q| before and after the refinement, and its step"]
    for each, (before, after) in zip(refinement[:RESIDUALS_SHOWN], pairs, strict=False):
        lines.append(
            f"    query {each['column']:<6} {before:>9.3g} {after:>9.3g} {each['step']:>6}"
        )
    for name, of_all in (("median", np.median(pairs, 0)), ("largest", pairs.max(0))):
        lines.append(f"    {name:<12} {of_all[0]:>9.3g} {of_all[1]:>9.3g}")
    return lines


def shortened(text: str, width: int) -> str:
    """A text on one line, cut at a word where it is too long; a terminal obeys none of it."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return (
        line
        if len(line) <= width
        else textwrap.shorten(line, width, placeholder=" …") or (line[: width - 1] + "…")
    )
