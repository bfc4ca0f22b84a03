"""Attention in blocks, and its own backward pass, against the formula and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jhessians.models import softmax
from jhessians.models.attention import attend
from tests.small import relative_error

DOCUMENTS, HEADS, GROUPS, FEATURES = 2, 4, 2, 8
VARIANTS = {
    "plain": {},
    "bias": {"bias"},
    "softcap": {"softcap"},
    "sinks": {"sinks"},
    "all": {"bias", "softcap", "sinks"},
}


def inputs(positions: int, names=frozenset()):
    random = np.random.default_rng(positions)

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    vectors = [draw(DOCUMENTS, positions, heads, FEATURES) for heads in (HEADS, GROUPS, GROUPS)]
    settings = {"bias": draw(HEADS, positions), "softcap": 2.0, "sinks": draw(HEADS)}
    return vectors, {name: settings[name] for name in names}, draw(*vectors[0].shape)


def as_arrays(settings):
    return {k: v if k == "softcap" else jnp.asarray(v) for k, v in settings.items()}


def formula(query, key, value, scale, window, *, bias=None, softcap=None, sinks=None):
    """One query after the other, in float64."""
    query, key, value = (np.float64(x) for x in (query, key, value))
    result = np.zeros_like(query)
    for n, s, h in np.ndindex(query.shape[:3]):
        group = h // (HEADS // GROUPS)
        first = max(0, s - window + 1)
        logits = scale * key[n, first : s + 1, group] @ query[n, s, h]
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        logits = logits if bias is None else logits + bias[h, first : s + 1]
        weights = np.exp(logits)
        total = weights.sum() + (0 if sinks is None else np.exp(np.float64(sinks[h])))
        result[n, s, h] = weights / total @ value[n, first : s + 1, group]
    return result


@pytest.mark.parametrize("backward_only", [False, True])
@pytest.mark.parametrize("window", [9, 1000])
@pytest.mark.parametrize("positions", [1, 40, 259, 390])  # 1, 1, 2 and 3 blocks, uneven ones too
def test_blocks_give_the_formula(positions, window, backward_only):
    vectors, settings, _ = inputs(positions, VARIANTS["all"])
    found = attend(
        *map(jnp.asarray, vectors), jnp.float32(0.3), jnp.int32(window),
        backward_only=backward_only, **as_arrays(settings),
    )  # fmt: skip
    assert relative_error(found, formula(*vectors, 0.3, window, **settings)) < 1e-6


@pytest.mark.parametrize("window", [9, 1000])
def test_one_query_gives_its_row_of_the_formula(window):
    """Each document's query stands elsewhere, and sees nothing of what stands behind it."""
    (query, key, value), settings, _ = inputs(40, VARIANTS["all"])
    at = np.array([3, 31])
    here = np.take_along_axis(query, at[:, None, None, None], axis=1)

    def found(position):
        arrays = (jnp.asarray(x) for x in (here, key, value))
        limits = jnp.float32(0.3), jnp.int32(window)
        position = jnp.asarray(position, jnp.int32)
        return np.asarray(attend(*arrays, *limits, position=position, **as_arrays(settings)))

    whole = formula(query, key, value, 0.3, window, **settings)
    expected = np.take_along_axis(whole, at[:, None, None, None], axis=1)
    assert relative_error(found(at), expected) < 1e-6
    assert relative_error(found(at + 1), expected) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("window", [9, 1000])
def test_its_own_backward_pass_is_the_derivative(variant, window):
    vectors, settings, weights = inputs(261, VARIANTS[variant])
    sinks = settings.pop("sinks", None)

    def loss(vectors, sinks, backward_only):
        mixed = attend(
            *vectors, jnp.float32(0.3), jnp.int32(window),
            sinks=sinks, backward_only=backward_only, **settings,
        )  # fmt: skip
        return jnp.sum(mixed * weights)

    vectors, sinks, settings = *jax.tree.map(jnp.asarray, (vectors, sinks)), as_arrays(settings)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    found, expected = (jax.tree.leaves(gradient(vectors, sinks, own)) for own in (True, False))
    assert len(found) == 3 + (sinks is not None)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 2e-6


def test_weights_of_all_positions_never_exist():
    """Neither forwards nor backwards: at 512 positions a block has 128 queries."""
    vectors, _, weights = inputs(512)

    def loss(vectors):
        mixed = attend(*vectors, jnp.float32(1), jnp.int32(600), backward_only=True)
        return jnp.sum(mixed * weights)

    text = jax.jit(jax.grad(loss)).lower([jnp.asarray(x) for x in vectors]).compile().as_text()
    assert "128,512]" in text and "512,512]" not in text


def test_forward_derivatives_work_where_no_tape_listens():
    vectors, _, _ = inputs(20)
    vectors = [jnp.asarray(x) for x in vectors]

    def mixed(*vectors):
        return attend(*vectors, jnp.float32(1), jnp.int32(99))

    _, tangent = jax.jvp(mixed, vectors, vectors)
    assert np.isfinite(tangent).all()


def test_short_documents_are_one_block():
    assert list(softmax._blocks(255)) == [(0, 255)]
    assert list(softmax._blocks(259)) == [(0, 129), (129, 259)]
    assert [stop for _, stop in softmax._blocks(4096)] == list(range(512, 4097, 512))
