"""An advice as text: tables, and what to make of them in sentences."""

from __future__ import annotations

import math
from textwrap import wrap

from jhessians.commands.advise.numbers import PARTS, Advice
from jhessians.commands.advise.tables import tables
from jhessians.config.units import count_in_words, share_in_words
from jhessians.linalg.agreement import cosine, times_more
from jhessians.report.spectrum import spectrum_lines
from jhessians.report.summary import WIDTH

ENOUGH = 0.14
"""An error of the inverse whose cosine to the truth is 0.99."""

POOR = 0.5
"""One whose cosine to the truth is below 0.9."""


def render(advice: Advice) -> str:
    """All that the terminal shows.

    Args:
        advice: What is known.

    Returns:
        Lines of at most 80 columns, but for long names.
    """
    modules = count_in_words(len(advice.spectra), "module")
    terms = count_in_words(advice.terms, "term")
    lines = [f"{advice.run}: Kronecker factors of {modules}, sums of {terms}", ""]
    lines += tables(advice)
    for title, sentences in (("Advice", advise_in_words(advice)), ("Warnings", advice.warnings)):
        if sentences:
            lines += ["", f"  {title}"]
        for sentence in sentences:
            lines += wrap(sentence, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(line.rstrip() for line in lines)


def advise_in_words(advice: Advice) -> list[str]:
    """What to make of the numbers, a few sentences for each matter.

    Args:
        advice: What is known.

    Returns:
        Paragraphs.
    """
    found = []
    if advice.examined is not None:
        found += _of_tokens(advice)
        found += _of_damping(advice)
    found += spectrum_lines(advice.spectra, advice.terms)
    if advice.examined is not None:
        worst = max(advice.spectra, key=lambda name: advice.contradicted([name]))
        found.append(
            f"Noise of few tokens: {share_in_words(advice.contradicted())} of all eigenvalues are "
            "less than half or more than twice what the other half of the data says, most in "
            f"{worst} ({share_in_words(advice.contradicted([worst]))})"
        )
    return [*found, _of_condition(advice)]


def _of_tokens(advice: Advice) -> list[str]:
    """Whether there are enough, and what more would bring."""
    examined, damping = advice.examined, advice.damping_factor
    assert examined is not None
    inverse = advice.inverse_error(damping)
    of_a, of_s, of_h = (share_in_words(advice.error(part)) for part in PARTS.values())
    half = count_in_words(examined.half_documents, "document")
    line = (
        f"By two halves of {half} each, the fit of all {examined.positions:,} positions errs by "
        f"about {of_a} in A, {of_s} in S and {of_h} in Λ (medians over modules), and by "
        f"{share_in_words(inverse)} in the inverse with damping factor {damping:g}. 4 times as "
        "many tokens would halve these errors"
    )
    if not math.isfinite(inverse):
        return [f"Tokens: too few to tell. {line}"]
    verdict = "enough" if inverse <= ENOUGH else "too few" if inverse > POOR else "usable"
    first = f"Tokens: {verdict}. Solutions have a cosine of about {cosine(inverse):.2f} to those "
    first += "of endless tokens"
    if inverse > ENOUGH:
        times = times_more(inverse, ENOUGH)
        first += f"; {cosine(ENOUGH):.2f} would take about {times:.2g} times as many"
    return [first, line, *_of_what_halves_share(advice, inverse)]


def _of_what_halves_share(advice: Advice, inverse: float) -> list[str]:
    """What of the inverse is wrong in both halves alike, so that they don't differ by it."""
    examined, shared = advice.examined, advice.shared_error(advice.damping_factor)
    assert examined is not None
    widest = max(each.dimension for sides in advice.spectra.values() for each in sides)
    alike = (
        f"both halves' inverses are wrong alike, by about {share_in_words(shared)} in the whole fit"
    )
    if examined.half_positions < widest:
        return [
            f"But a half's {examined.half_positions:,.0f} positions can't fill {widest:,} "
            f"dimensions, so that 1/√n doesn't hold for the inverse yet: {alike}"
        ]
    if shared > inverse:
        return [
            f"But 1/√n doesn't hold for the inverse yet: {alike}, since the smallest eigenvalues "
            "of few tokens come out too small. More damping helps there"
        ]
    if shared > inverse / 2:
        return [f"Besides, {alike}; that falls as 1/n"]
    return []


def _of_damping(advice: Advice) -> list[str]:
    examined = advice.examined
    assert examined is not None
    choice = examined.choice
    if examined.trial is None:
        return []
    if choice is None:
        return ["Damping: the held-out documents can't tell, since no query has a gradient"]
    documents = count_in_words(examined.held_out, "document")
    line = (
        f"Damping: {choice.damping:g}. On {documents} that were held out, solutions with it are "
        f"worth {choice.gain:.3g} times the plain gradients"
    )
    if choice.best != choice.damping:
        line += (
            f". Less damping is worth hardly more, {choice.best_gain:.3g} times with "
            f"{choice.best:g}, and errs more for want of tokens"
        )
    if choice.at_end:
        line += (
            f". It is the {choice.at_end} damping factor that was tried; one beyond may be better: "
            "give others with --dampings"
        )
    return [line]


def _of_condition(advice: Advice) -> str:
    """The worst module's, and how many have no inverse."""
    worst = max(advice.curvatures, key=lambda name: advice.curvatures[name].damped_condition_number)
    singular = sum(math.isinf(each.condition_number) for each in advice.curvatures.values())
    line = (
        f"Condition number, with damping factor {advice.damping_factor:g}: at most "
        f"{advice.curvatures[worst].damped_condition_number:,.0f}, of {worst}"
    )
    if singular:
        line += f"; without damping {singular} of {len(advice.curvatures)} modules are singular"
    return line
