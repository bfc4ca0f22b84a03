"""The loss in slices of the vocabulary, against float64 over all of it at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from jhessians.models import vocabulary
from jhessians.models.sampling import sample
from jhessians.models.vocabulary import NO_LABEL, sliced_losses
from tests.models.test_loss import Head
from tests.small import relative_error

ROUNDING = 3e-6  # of exponentials in float32
T, D, V = 10, 6, 45  # of blocks of 7 tokens, the last one has 3
DOCUMENT, POSITION = np.arange(T, dtype=np.int32) // 4, np.arange(T, dtype=np.int32) % 4


@pytest.fixture(params=[1, 14 * T, 10**6], ids=["a block a slice", "two", "all"])
def sliced(request, monkeypatch):
    monkeypatch.setattr(vocabulary, "SLICE_LOGITS", request.param)


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(0)
    hidden, head = random.standard_normal((T, D)), 2 * random.standard_normal((V, D))
    targets = random.integers(0, V, T).astype(np.int32)
    targets[3], targets[4], targets[5] = NO_LABEL, V - 1, 0
    weights = np.where(targets == NO_LABEL, 0, random.random(T) + 0.5)
    return hidden, head, targets, weights


def computed(case, **options):
    """Losses and gradients; softcap, scale and bias are the model's."""
    hidden, head, targets, weights = case
    model = Head(hidden, head)
    for name in ("softcap", "scale"):
        if name in options:
            field = {"softcap": "logit_softcap", "scale": "logit_scale"}[name]
            model.config = model.config.__class__(**vars(model.config) | {field: options.pop(name)})
    if "bias" in options:
        model.head_bias = nnx.data(nnx.Param(jnp.asarray(options.pop("bias"), jnp.float32)))
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, hidden, weights):
        model = nnx.merge(graph, state)
        return sliced_losses(model, hidden, jnp.asarray(targets), weights, *where, **options)

    where = jnp.asarray(DOCUMENT), jnp.asarray(POSITION)
    return run(state, jnp.asarray(hidden, jnp.float32), jnp.asarray(weights, jnp.float32))


def expected(case, labels, *, smoothing=0.0, log_odds=False, softcap=None, scale=1.0, bias=0.0):
    """The same from the formulas, in float64."""
    hidden, head, _, weights = case
    z = scale * (hidden @ head.T + bias)
    slope = np.full_like(z, scale)
    if softcap:
        slope = scale * (1 - np.tanh(z / softcap) ** 2)
        z = softcap * np.tanh(z / softcap)
    one = np.eye(V)[labels]
    target = (1 - smoothing) * one + smoothing / V
    counted = np.where(one > 0, -np.inf, z) if log_odds else z
    losses = scipy.special.logsumexp(counted, axis=-1) - (target * z).sum(-1)
    gradient = (scipy.special.softmax(counted, axis=-1) - target) * slope * weights[:, None]
    return (weights * losses).sum(), gradient @ head


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smoothing": 0.2},
        {"log_odds": True},
        {"softcap": 3.0, "scale": 0.5},
        {"bias": np.linspace(-2, 2, V)},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_equals_the_formulas(sliced, case, options):
    values, gradients = computed(case, sampled=False, **options)
    value, gradient = expected(case, np.where(case[2] == NO_LABEL, 0, case[2]), **options)
    assert float(values[0]) == pytest.approx(value, rel=1e-6)
    assert relative_error(np.asarray(gradients[0], np.float64), gradient) < ROUNDING


def test_draws_the_labels_that_all_logits_together_would(sliced, case):
    values, gradients = computed(case, sampled=True, seed=3, draws=4)
    logits = jnp.asarray(case[0] @ case[1].T, jnp.float32)
    where = jnp.asarray(DOCUMENT), jnp.asarray(POSITION)
    drawn = [np.asarray(sample(logits, *where, 3, draw)) for draw in range(4)]
    assert len({tuple(labels) for labels in drawn}) == 4
    for labels, value, gradient in zip(drawn, values, gradients, strict=True):
        expected_value, expected_gradient = expected(case, labels)
        assert float(value) == pytest.approx(expected_value, rel=1e-6)
        assert relative_error(np.asarray(gradient, np.float64), expected_gradient) < ROUNDING
