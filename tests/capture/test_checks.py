"""Faulty folds are refused before the model is traced, in one line that says what is wrong."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians

O, I = 2, 3  # noqa: E741


class Model(nnx.Module):
    def __init__(self, rngs):
        self.inner = jhessians.Linear(4, I, rngs=rngs)
        self.outer = jhessians.Linear(I, O, rngs=rngs)

    def __call__(self, x):
        return self.outer(jnp.tanh(self.inner(x)))


BATCH = {"x": np.ones((8, 5, 4), np.float32), "position_mask": np.ones((8, 5), bool)}


def loss(model, batch):
    return jnp.sum(model(batch["x"]) ** 2)


@pytest.fixture(scope="module")
def problem():
    model = Model(nnx.Rngs(0))
    return jhessians.Problem(loss, model, jhessians.find_sites(loss, model, BATCH))


@dataclass(frozen=True)
class Own:
    """A fold as its author may get it wrong: `kept` says what it promises, `made` what it gives."""

    kept: Any
    made: Any

    def shapes(self, site):
        return self.kept(site)

    def term(self, site, a, g, operands, context):
        return self.made(site, a, g)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def weight(site):
    return struct(site.out_features, site.in_features)


def squares(site, a, g):
    return jnp.square(jnp.einsum("nso,nsi->noi", g, a)).sum(0)


FAULTS = {
    "shape": (weight, lambda s, a, g: jnp.einsum("nso,nsi->noi", g, a),
              r"^Own.term at inner has shape \[8, 3, 4\]; expected \[3, 4\] as Own.shapes says$"),
    "structure": (lambda s: {"w": weight(s)}, squares,
                  r"Own.term at inner gives \[3, 4\]; expected {'w': \[3, 4\]} as Own.shapes says"),
    "entry": (lambda s: {"w": weight(s)}, lambda s, a, g: {"w": squares(s, a, g).T},
              r"Own.term at inner\['w'\] has shape \[4, 3\]; expected \[3, 4\]"),
    "complex": (weight, lambda s, a, g: squares(s, a, g) + 1j,
                "Own.term at inner has numbers of type complex64; expected float32"),
    "scalar": (lambda s: struct(), lambda s, a, g: jnp.sum(a),
               r"Own.shapes at inner has a scalar; .* give a single number shape \(1,\)"),
    "tuple": (lambda s: (2, 3), squares, "Own.shapes at inner has 2; expected a jax.ShapeDtypeStr"),
    "nothing": (lambda s: {}, lambda s, a, g: {}, "Own.shapes at inner has no statistic"),
    "integers": (lambda s: struct(1, dtype=jnp.int32), lambda s, a, g: jnp.ones(1, jnp.int32),
                 "Own.shapes at inner has numbers of type int32; expected a floating type"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_fold_is_refused_in_one_line(problem, fault):
    kept, made, message = FAULTS[fault]

    def untouched(model, batch):
        raise AssertionError("the model was traced")

    here = jhessians.Problem(untouched, problem.model, problem.sites)
    with pytest.raises(jhessians.FoldError, match=message) as caught:
        jhessians.run_pass(Own(kept, made), here, [BATCH])
    assert "\n" not in str(caught.value)


def test_a_sound_fold_passes_and_keeps_its_number_format(problem):
    sums = jhessians.run_pass(Own(weight, squares), problem, [BATCH])
    assert sums["outer"].shape == (O, I) and sums["outer"].dtype == jnp.float32
    half = jhessians.Covariance(jnp.float16)
    leaves = jax.tree.leaves(jhessians.run_pass(half, problem, [BATCH]))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float16)}


def test_an_error_of_the_folds_own_says_where_it_happened(problem):
    fold = Own(weight, lambda s, a, g: jnp.einsum("nso,nsi->noi", a, g) @ a)
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        jhessians.run_pass(fold, problem, [BATCH])
    assert "(Own.term at inner, for a [8, 5, 4] and g [8, 5, 3])" in caught.value.__notes__


def test_a_missing_operand_is_named(problem):
    message = "EigenvalueCorrection.term at inner needs the operand 'activation', but has none"
    with pytest.raises(jhessians.FoldError, match=message):
        jhessians.run_pass(jhessians.EigenvalueCorrection(), problem, [BATCH])


def test_statistics_of_something_else_are_refused(problem):
    sums = jhessians.initialize(Own(weight, squares), problem)
    with pytest.raises(jhessians.FoldError, match="the statistics of inner gives"):
        jhessians.accumulate(jhessians.Covariance(), problem, BATCH, sums)
    del sums["outer"]
    with pytest.raises(jhessians.FoldError, match="the statistics have nothing of outer"):
        jhessians.accumulate(Own(weight, squares), problem, BATCH, sums)


def test_a_fold_that_cannot_be_hashed_is_refused(problem):
    fold = Own(weight, [])
    with pytest.raises(jhessians.FoldError, match="Own can't be hashed; expected a frozen datacl"):
        jhessians.initialize(fold, problem)


def test_a_batch_that_devices_cannot_share_is_refused(problem):
    here = jhessians.Problem(loss, problem.model, problem.sites, mesh=jhessians.make_mesh(3))
    sums = jhessians.initialize(Own(weight, squares), here)
    with pytest.raises(ValueError, match="8 documents for 3 devices; expected a multiple"):
        jhessians.accumulate(Own(weight, squares), here, BATCH, sums)


def test_which_positions_count_is_never_a_guess(problem):
    """A tokenizer's attention_mask is no position_mask: it holds each document's last token."""
    batch = {"x": BATCH["x"], "attention_mask": BATCH["position_mask"]}
    for call in (jhessians.run_pass, lambda fold, *rest: jhessians.fit(*rest)):
        with pytest.raises(ValueError, match="has attention_mask but no position_mask; expected"):
            call(jhessians.Covariance(), problem, [batch])
    everything = batch | {"position_mask": None}
    a = jhessians.unpack(
        jhessians.Covariance(),
        problem,
        jhessians.run_pass(jhessians.Covariance(), problem, [everything]),
    )
    np.testing.assert_array_equal(a["inner"]["activation"], np.full((4, 4), 40.0))


def test_a_mask_of_whole_numbers_counts_as_booleans(problem):
    mask = np.arange(5)[None] < np.arange(8)[:, None]
    fold = jhessians.Covariance()
    wanted, found = (
        jhessians.run_pass(fold, problem, [BATCH | {"position_mask": m}])
        for m in (mask, mask.astype(np.int32))
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_mask_of_another_form_is_refused(problem):
    batch = BATCH | {"position_mask": np.ones(8, bool)}
    with pytest.raises(ValueError, match=r"shape \[8\]; expected \[document, position\]"):
        jhessians.accumulate(jhessians.Covariance(), problem, batch,
                             jhessians.initialize(jhessians.Covariance(), problem))  # fmt: skip
