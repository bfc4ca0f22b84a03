"""What the spectra of a fit say, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping

from jhessians.config.units import share_in_words
from jhessians.influence.spectra import Sides, dead_modules
from jhessians.linalg.spectra import median


def spectrum_lines(spectra: Mapping[str, Sides], terms: int) -> list[str]:
    """Ranks, noise floor and dead modules.

    Args:
        spectra: Module → the spectra of its factors.
        terms: How many terms the factors are sums of.

    Returns:
        A sentence for each.
    """
    alive = [sides for sides in spectra.values() if not sides.dead]
    lines = []
    if alive:
        ranks = {
            k: (
                share_in_words(median(x[k].effective_rank / x[k].dimension for x in alive)),
                median(x[k].stable_rank for x in alive),
            )
            for k in (0, 1)
        }
        lines.append(
            f"Effective rank: {ranks[0][0]} of A's dimensions and {ranks[1][0]} of S's (stable "
            f"ranks {ranks[0][1]:.1f} and {ranks[1][1]:.1f}; medians over modules)"
        )
        lines.append(_floor(alive, terms))
    dead, experts = dead_modules(spectra)
    if dead:
        of = f"{experts} linears of experts" if experts else f"{len(spectra)} modules"
        named = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
        lines.append(f"{len(dead)} of {of} are dead, no token reached them: {named}")
    return lines


def _floor(alive: list[Sides], terms: int) -> str:
    """Shares of eigenvalues at the noise floor, over all modules."""
    shares = []
    for k in (0, 1):
        dimensions = sum(each[k].dimension for each in alive)
        shares.append(sum(each[k].at_floor * each[k].dimension for each in alive) / dimensions)
    of_a, of_s = map(share_in_words, shares)
    line = f"Noise floor of rounding: {of_a} of A's eigenvalues and {of_s} of S's are at it"
    widest = max(spectrum.dimension for each in alive for spectrum in each)
    if terms < widest:
        line += f"; {terms:,} terms can't fill {widest:,} dimensions"
    return line
