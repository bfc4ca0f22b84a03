"""Grams of gradient rows against float64 numpy, written from the definition.

The random matrices are bergson's own; normalizers, heads, biases and tokens are done by hand.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bergson.collector.collector import create_module_projection_matrix
from bergson.collector.projection_matrix import random_matrix

from jhessians.capture.fold import Context, Fold, JointFold
from jhessians.capture.site import Site
from jhessians.folds.gram import Gram, JointGram
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer
from jhessians.folds.rows import GradientRows
from jhessians.linalg.projection import Projection
from tests.small import relative_error
from tests.tolerances import FACTORS

N, S, I, O, P = 4, 9, 10, 12, 3  # noqa: E741
HEADS = 3
NAME = "block.linear"


@dataclass(frozen=True)
class Case:
    """What rows are made of."""

    bias: bool = False
    normalizer: str = "none"
    tokens: bool = False
    heads: bool = False
    projected: bool = True
    joint: bool = False


CASES = [
    Case(),
    Case(bias=True),
    Case(projected=False, bias=True, normalizer="adafactor"),
    Case(tokens=True, normalizer="adafactor", bias=True),
    Case(tokens=True, normalizer="adam", bias=True, heads=True),
    Case(normalizer="adam", heads=True),
    Case(normalizer="adafactor", heads=True),
    Case(bias=True, heads=True),
    Case(projected=False, tokens=True, normalizer="adam"),
    Case(joint=True, heads=True, normalizer="adafactor", bias=True),
    Case(joint=True, tokens=True, normalizer="adam", bias=True),
]


@functools.cache
def data():
    random = np.random.default_rng(0)
    a, g = random.standard_normal((N, S, I)), random.standard_normal((N, S, O))
    mask = random.random((N, S)) < 0.7
    mask[1] = False  # a document of which nothing counts
    moments = {"weight": random.random((O, I)) + 0.1, "row": random.random(O) + 0.1,
               "col": random.random(I) + 0.1, "bias": random.random(O) + 0.1}  # fmt: skip
    return a.astype(np.float32), g.astype(np.float32), mask, moments


def normalizer_of(case):
    moments = {name: values.astype(np.float32) for name, values in data()[3].items()}
    bias = moments["bias"] if case.bias else None
    if case.normalizer == "adam":
        return AdamNormalizer(moments["weight"], bias)
    if case.normalizer == "adafactor":
        return AdafactorNormalizer(moments["row"], moments["col"], bias)
    return None


def scaled_gradients(case):
    """[row, out, in'] of every head, in float64."""
    a, g, mask, moments = data()
    g = np.where(mask[:, :, None], g.astype(np.float64), 0)
    a = np.concatenate([a, np.ones((N, S, 1))], -1) if case.bias else a.astype(np.float64)
    outer = "nso,nsi->nsoi" if case.tokens else "nso,nsi->noi"
    gradients = np.einsum(outer, g, a).reshape(-1, O, a.shape[-1])
    result = []
    for rows in np.split(np.arange(O), HEADS if case.heads else 1):
        part = gradients[:, rows].copy()
        if case.normalizer == "adam":
            part[..., :I] /= np.sqrt(moments["weight"][rows]) + 1e-8
            if case.bias:
                part[..., I] /= np.sqrt(moments["bias"][rows]) + 1e-8
        if case.normalizer == "adafactor":
            r, c = moments["row"][rows], moments["col"]
            part[..., :I] *= np.sqrt(r.mean() / np.outer(r, c))
            if case.bias:
                part[..., I] /= np.sqrt(moments["bias"][rows] + 1e-8)
        result.append(part)
    return result


def oracle(case):
    """The Grams of all heads, one under the other; or the joint one."""
    names = [f"{NAME}.head_{h}" for h in range(HEADS)] if case.heads else [NAME]
    grams, total = [], 0
    for name, gradients in zip(names, scaled_gradients(case), strict=True):
        o, i = gradients.shape[1:]
        if case.joint:
            matrix = random_matrix(f"{name}/single/0", P, o * i, "cpu", "rademacher").numpy()
            total = total + gradients.reshape(len(gradients), -1) @ matrix.T / np.sqrt(P)
            continue
        rows = gradients
        if case.projected:
            shared = not case.bias and case.normalizer != "adam"
            left, right = (
                create_module_projection_matrix(
                    of, role, P, n, torch.float64, torch.device("cpu"), "rademacher", "jl", None
                ).numpy()
                for of, role, n in ((name, "left", o), (NAME if shared else name, "right", i))
            )
            rows = left @ gradients @ right.T
        rows = rows.reshape(len(rows), -1)
        grams.append(rows.T @ rows)
    return total.T @ total if case.joint else np.concatenate(grams)


def found(case, change=lambda keys: keys):
    a, g, mask, _ = data()
    site = Site(NAME, I, O, use_bias=case.bias, ones=case.bias, input_site=NAME)
    rows = GradientRows(
        Projection(P) if case.projected else None,
        tokens=case.tokens,
        split=(NAME,) if case.heads else (),
        heads=HEADS,
    )
    normalizer = normalizer_of(case)
    operands = {} if normalizer is None else {"normalizer": normalizer}
    if case.projected:
        make = rows.global_keys if case.joint else rows.matrix_keys
        operands["keys"] = change(make(site, NAME, *([] if case.joint else [normalizer])))
    fold = (JointGram if case.joint else Gram)(rows)

    @jax.jit
    def compute(a, g, mask, operands):
        term = fold.term(site, a, g, operands, Context(mask=mask))
        return fold.finish_rows(term) if case.joint else term

    result = np.asarray(compute(a, g, mask, operands))
    shape = fold.shapes() if case.joint else fold.shapes(site)
    assert result.shape == shape.shape and result.dtype == shape.dtype
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grams_are_those_of_the_definition(case):
    with jax.default_matmul_precision("highest"):
        assert relative_error(found(case), oracle(case)) < FACTORS


def test_left_and_right_exchanged_is_a_wrong_twin():
    wrong = found(Case(), change=lambda keys: keys[::-1])
    assert relative_error(wrong, oracle(Case())) > 1e4 * FACTORS


def test_what_is_masked_may_be_anything():
    a, g, mask, _ = data()
    site = Site(NAME, I, O, use_bias=False, input_site=NAME)
    g = np.where(mask[:, :, None], g, np.nan)
    term = Gram(GradientRows()).term(site, jnp.asarray(a), jnp.asarray(g), {}, Context(mask=mask))
    assert np.isfinite(term).all()


def test_kinds_of_folds_are_told_apart():
    rows = GradientRows(Projection(P))
    assert isinstance(JointGram(rows), JointFold)
    assert isinstance(Gram(rows), Fold) and not isinstance(Gram(rows), JointFold)
