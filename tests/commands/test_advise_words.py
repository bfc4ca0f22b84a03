"""What `advise` says of numbers that are made up."""

import numpy as np
import pytest

from jhessians.commands.advise.halves import Examined
from jhessians.commands.advise.numbers import Advice, numbers
from jhessians.commands.advise.tables import rows_of, tables
from jhessians.commands.advise.words import advise_in_words
from jhessians.config.units import share_in_words
from jhessians.influence.damping import Trial, choose
from jhessians.influence.halves import ModuleAgreement
from jhessians.influence.spectra import Curvature, Sides
from jhessians.linalg.agreement import Products
from jhessians.linalg.spectra import describe
from jhessians.report.spectrum import spectrum_lines


def differing(error):
    """Products of halves that differ by twice this share of what they have in common."""
    return Products(1 + 2 * error**2, 1 + 2 * error**2, 1.0)


def advice(error, *, shared=0.0, half=5000, modules=2, gains=None):
    values = np.array([8.0, 4.0, 2.0, 2.0])
    sides = Sides(describe(values, precision=1e-7), describe(values, precision=1e-7))
    names = [f"layers.{n // 4}.linear_{n % 4}" for n in range(modules)]
    inverses = {0.01: differing(error), 1.0: differing(error / 2)}
    alike = dict.fromkeys(inverses, Products(1.0, (1 + shared) ** 2, 1 + shared))
    found = ModuleAgreement(*[differing(error)] * 3, 0.25, 0.5, inverses, alike)
    trial = None if gains is None else Trial((0.01, 1.0), gains, np.ones_like(gains))
    choice = None if gains is None else choose((0.01, 1.0), gains)
    examined = Examined(100, 2 * half, 50, half, 2, 10, dict.fromkeys(names, found), trial, choice)
    curvature = Curvature(1.0, 2.0, np.inf, 40.0)
    return Advice("run", 0.01, 2 * half, dict.fromkeys(names, sides),
                  dict.fromkeys(names, curvature), examined)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (0.05, ["Tokens: enough.", "cosine of about 1.00", "5.0% in A", "5.0% in the inverse"]),
        # (0.28 / 0.14)² is 4.
        (0.28, ["Tokens: usable.", "cosine of about 0.96", "about 4 times as many", "28% in S"]),
        (2.0, ["Tokens: too few.", "cosine of about 0.45"]),
    ],
)
def test_tokens(error, words):
    said = " ".join(advise_in_words(advice(error)))
    for each in words:
        assert each in said
    # A quarter of A's eigenvalues, half of S's.
    assert "Noise of few tokens: 38% of all eigenvalues" in said
    assert ("would take" in said) == (error > 0.14)
    assert "1/√n" not in said and "wrong alike" not in said


def test_halves_that_have_nothing_in_common():
    said = advise_in_words(advice(np.inf))[0]
    assert said.startswith("Tokens: too few to tell.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared": 0.06}, "Besides, both halves' inverses are wrong alike, by about 5.8%"),
        ({"shared": 0.3}, "But 1/√n doesn't hold for the inverse yet"),
        ({"half": 3}, "But a half's 3 positions can't fill 4 dimensions"),
    ],
)
def test_where_errors_do_not_fall_as_the_root(options, words):
    assert words in " ".join(advise_in_words(advice(0.1, **options)))


def test_damping():
    best = np.array([[1.0, 1.0], [3.0, 3.0]])
    said = " ".join(advise_in_words(advice(0.1, gains=best)))
    assert "Damping: 1. On 10 documents that were held out, solutions with it are worth 3" in said
    assert "It is the largest damping factor that was tried" in said
    said = " ".join(advise_in_words(advice(0.1, gains=np.array([[3.05, 3.05], [3.0, 3.0]]))))
    assert "Less damping is worth hardly more, 3.05 times with 0.01" in said
    said = " ".join(advise_in_words(advice(0.1, gains=np.full((2, 2), np.nan))))
    assert "the held-out documents can't tell" in said


def test_many_modules_are_shown_by_layer():
    few, many = advice(0.1, modules=8), advice(0.1, modules=40)
    assert len(rows_of(list(few.spectra))) == 8
    rows = rows_of(list(many.spectra))
    assert list(rows) == [f"layers.{n}" for n in range(10)] and len(rows["layers.3"]) == 4
    lines = tables(many)
    assert sum(line.startswith("  layers.3 ") for line in lines) == 2
    assert all(len(line) <= 80 for line in lines)
    # Σ λ / λ_max is 2; the entropy of ½, ¼, ⅛, ⅛ is 1.75 bits: 3.36 of 4.
    assert lines[1].split() == ["layers.0", "2.0", "84%", "2.0", "84%", "0%", "40"]


def test_layers_are_in_order_and_what_is_outside_of_them_first():
    names = ["layers.10.a", "layers.9.a", "head", "layers.9.b"]
    assert list(rows_of(names)) == ["head", "layers.9.a", "layers.9.b", "layers.10.a"]


def test_numbers_that_are_not_finite_are_null():
    found = numbers(advice(np.inf))
    assert found["modules"]["layers.0.linear_0"]["hessian"]["condition_number"] is None
    assert found["halves"]["inverse_errors"]["0.01"] is None
    assert numbers(advice(0.1))["halves"]["errors"]["hessian"] == pytest.approx(0.1)


def test_dead_experts_and_missing_terms():
    alive = describe(np.array([1.0, 1.0, 1e-12, 0.0]), precision=1e-7)
    dead = describe(np.zeros(4), precision=1e-7)
    spectra = {f"mlp.experts.expert_{n}.down_proj": Sides(alive, alive) for n in range(3)}
    spectra["mlp.experts.expert_3.down_proj"] = Sides(dead, dead)
    first, second, third = spectrum_lines(spectra, 2)
    assert first.startswith(
        "Effective rank: 50% of A's dimensions and 50% of S's (stable ranks 2.0"
    )
    assert "50% of A's eigenvalues and 50% of S's are at it; 2 terms can't fill 4 dim" in second
    assert third.startswith("1 of 4 linears of experts are dead") and "expert_3.down_proj" in third
    assert len(spectrum_lines({"a": Sides(alive, alive)}, 100)) == 2
    assert spectrum_lines({"a": Sides(dead, dead)}, 100) == [
        "1 of 1 modules are dead, no token reached them: a"
    ]


def test_shares():
    shares = [0.0, 0.0004, 0.041, 0.5, 2.5, 1e9, np.inf, np.nan]
    assert [*map(share_in_words, shares)] == [
        "0%", "0.0%", "4.1%", "50%", "250%", "> 999%", "> 999%", "-"
    ]  # fmt: skip
