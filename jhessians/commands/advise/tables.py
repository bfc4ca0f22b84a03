"""The tables of an advice, for a terminal of 80 columns; only long names run over."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from textwrap import wrap

from jhessians.commands.advise.numbers import PARTS, Advice
from jhessians.config.units import share_in_words
from jhessians.influence.damping import mean_gains
from jhessians.linalg.spectra import median
from jhessians.report.summary import WIDTH

MODULES_SHOWN = 32
"""With more of them there is a row for each layer."""

LAYER = re.compile(r"^.*?\.\d+(?=\.|$)")


def tables(advice: Advice) -> list[str]:
    """All tables, as far as there are numbers.

    Args:
        advice: What is known.

    Returns:
        Lines.
    """
    rows = rows_of(list(advice.spectra))
    width = max(26, *map(len, rows))
    lines = _spectra(advice, rows, width)
    if advice.examined is not None:
        lines += ["", *_errors(advice, rows, width)]
        if advice.examined.trial is not None:
            lines += ["", *_dampings(advice)]
    return lines


def rows_of(modules: Sequence[str]) -> Mapping[str, list[str]]:
    """What rows a table has.

    Args:
        modules: All of them.

    Returns:
        Row → the modules that it is about, by layer: one each, or those of a layer where they are
            more than `MODULES_SHOWN`.
    """
    rows: dict[str, list[str]] = {}
    for name in sorted(modules, key=_number):
        layer = LAYER.match(name)
        row = layer[0] if layer and len(modules) > MODULES_SHOWN else name
        rows.setdefault(row, []).append(name)
    return rows


def _number(module: str) -> int:
    """Of the layer; what is outside of layers comes first."""
    layer = LAYER.match(module)
    return int(layer[0].rpartition(".")[2]) if layer else -1


def _spectra(advice: Advice, rows: Mapping[str, list[str]], width: int) -> list[str]:
    heads = f"{'A stable':>9}{'of d':>7}{'S stable':>10}{'of d':>7}{'floor':>8}{'condition':>11}"
    lines = [f"  {'Spectra':<{width}}{heads}"]
    for row, modules in rows.items():
        sides = [advice.spectra[name] for name in modules]
        cells = ""
        for k, room in ((0, 9), (1, 10)):
            stable = median(each[k].stable_rank for each in sides)
            share = median(each[k].effective_rank / each[k].dimension for each in sides)
            cells += f"{stable:>{room}.1f}{share_in_words(share):>7}"
        floor = max(max(each.activation.at_floor, each.gradient.at_floor) for each in sides)
        condition = max(advice.curvatures[name].damped_condition_number for name in modules)
        number = f"{condition:,.0f}" if condition < 1e7 else f"{condition:.0e}"
        lines.append(f"  {row:<{width}}{cells}{share_in_words(floor):>8}{number:>11}")
    by_layer = len(rows) < len(advice.spectra)
    return lines + _legend(
        "stable: stable rank; of d: effective rank by entropy, of the dimension; floor: share of "
        "eigenvalues at the noise floor of rounding, A's or S's; condition: condition number of "
        f"H with damping factor {advice.damping_factor:g}."
        + (" Of a layer: medians, but of floor and condition the largest." if by_layer else "")
    )


def _errors(advice: Advice, rows: Mapping[str, list[str]], width: int) -> list[str]:
    heads = f"{'A':>9}{'S':>9}{'Λ':>9}{'inverse':>12}{'unsure':>12}"
    lines = [f"  {'Errors of the whole fit':<{width}}{heads}"]
    for row, modules in (*rows.items(), ("all", list(advice.spectra))):
        shares = [advice.error(part, modules) for part in PARTS.values()]
        cells = "".join(f"{share_in_words(share):>9}" for share in shares)
        cells += f"{share_in_words(advice.inverse_error(advice.damping_factor, modules)):>12}"
        cells += f"{share_in_words(advice.contradicted(modules)):>12}"
        lines.append(f"  {row:<{width}}{cells}")
    return lines + _legend(
        "Relative Frobenius errors, from how far two halves of the data differ; Λ: with its "
        f"eigenvectors; inverse: of (H + {advice.damping_factor:g} mean)⁻¹ q; unsure: share of A's "
        "and S's eigenvalues to which the other half gives less than half or more than twice. Of "
        "several modules: medians, but the inverse as one vector."
    )


def _dampings(advice: Advice) -> list[str]:
    examined = advice.examined
    assert examined is not None and examined.trial is not None
    trial = examined.trial
    lines = [f"  {'Damping factor':<16}{'gain':>8}{'residual':>12}{'error of the inverse':>24}"]
    gains = mean_gains(trial.gains).tolist()
    for damping, gain, residuals in zip(trial.dampings, gains, trial.residuals, strict=True):
        error = share_in_words(advice.inverse_error(damping))
        residual = median(residuals.tolist())
        lines.append(f"  {damping:<16g}{gain:>8.3g}{residual:>12.3g}{error:>24}")
    return lines + _legend(
        "gain: what the best multiple of x = (H + D)⁻¹ q takes off the held-out quadratic "
        "xᵀGx / 2 - qᵀx, as a multiple of what q itself does; residual: |q - (G + D) x| / |q|."
    )


def _legend(text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
