"""Factored methods of whole models against bergson in float64, fitted a document at a time.

bergson's unit of statistics is whatever batch it packs; ours is the document, which is its answer
at a batch size of one.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.oracles import bergson
from tests.test_bergson import Case, errors, models, ours
from tests.tolerances import FACTORS

__all__ = ["models"]  # the fixture

# A third of all combinations by default; the others are as long and less likely to differ.
QUICK = {("llama", "tkfac", False), ("llama", "shampoo", False), ("gpt_neox", "tkfac", True),
         ("gpt2", "shampoo", True)}  # fmt: skip
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(
        ("llama", "gpt_neox", "gpt2"), ("kfac", "tkfac", "shampoo"), (False, True)
    )
]


@pytest.mark.parametrize(("family", "method", "bias"), CASES)
def test_factors_equal_bergsons_by_document(family, method, bias, models, tmp_path: Path):
    case = Case(family, shared=(("include_bias", bias),))
    ours(tmp_path / "run", case, models, method=method, ev_correction=True)
    truth = bergson.fit(
        models[family],
        models[family] / "docs.jsonl",
        method=method,
        include_bias=bias,
        max_batch_size=1,
    )
    found, expected = bergson.read(tmp_path / "run"), bergson.read(truth)
    assert found["total_processed"] == expected["total_processed"]
    assert set(found) == set(expected)
    for folder in ("activation_sharded", "gradient_sharded"):
        worst = max(errors(found[folder], expected[folder]).values())
        assert worst < FACTORS, (folder, worst)
    for name, theirs in expected["eigenvalue_correction_sharded"].items():
        mine = found["eigenvalue_correction_sharded"][name]
        assert np.sum(mine) == pytest.approx(np.sum(theirs), rel=FACTORS), name
    for name, theirs in expected["eigenvalue_sharded"].items():
        assert errors({name: found["eigenvalue_sharded"][name]}, {name: theirs})[name] < FACTORS
