"""The chunked loss against plain cross-entropy in float64, and labels drawn from the model."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from flax import nnx

from jhessians.data.batching import Batch
from jhessians.models import loss as loss_module
from jhessians.models import noise
from jhessians.models.decoder import Decoder
from jhessians.models.loss import NextTokenLoss, sample
from tests.small import decoder, relative_error

V, D = 11, 6


class Head(Decoder):
    """A decoder whose hidden states are its parameters, so that their gradient can be asked for."""

    def __init__(self, states, head):
        self.states = nnx.Param(jnp.asarray(states, jnp.float32))
        self.head = nnx.Param(jnp.asarray(head, jnp.float32))
        self.head_bias = None
        self.config = dataclasses.replace(decoder().config, vocabulary_size=len(head))

    def hidden(self, tokens, lengths=None):
        return self.states[...]


def make(seed=0, n=3, s=8, vocabulary=V):
    """Hidden states, head, and a batch with ignored positions, padding and an unlabelled row."""
    random = np.random.default_rng(seed)
    states = random.standard_normal((n, s, D))
    head = 2 * random.standard_normal((vocabulary, D))
    lengths = np.array([s, s - 3, s - 1])[:n]
    real = np.arange(s) < lengths[:, None]
    tokens = np.where(real, random.integers(0, vocabulary, (n, s)), 0).astype(np.int32)
    labels = np.where(real & (random.random((n, s)) < 0.7), tokens, -100).astype(np.int32)
    labels[-1] = -100
    mask = np.arange(s) + 1 < lengths[:, None]
    return states, head, Batch(tokens, labels, mask, np.arange(n, dtype=np.int32))


def draw(logits, document, position, *, seed):
    return np.asarray(jax.jit(sample, static_argnums=3)(logits, document, position, seed))


def value_and_gradient(loss, states, head, batch):
    """The loss, and its gradient at the hidden states."""
    graph, parameters = nnx.split(Head(states, head))
    function = jax.value_and_grad(lambda p, batch: loss(nnx.merge(graph, p), batch))
    value, gradient = jax.jit(function)(parameters, batch)
    return float(value), np.asarray(gradient["states"][...], np.float64)


def oracle(states, head, labels, reduction="sum"):
    """The same in float64 from softmax minus one-hot, document by document."""
    value, gradient = 0.0, np.zeros_like(states)
    for n, row in enumerate(labels):
        positions = np.flatnonzero(row[1:] != -100)
        weight = max(len(positions), 1) ** {"sum": 0, "mean": -0.5, "mean_gradient": -1}[reduction]
        for t in positions:
            logits = head @ states[n, t]
            target = row[t + 1]
            value += weight * (scipy.special.logsumexp(logits) - logits[target])
            probabilities = scipy.special.softmax(logits)
            gradient[n, t] = weight * (probabilities - np.eye(len(head))[target]) @ head
    return value, gradient


@pytest.mark.parametrize(
    ("reduction", "chunk"),
    [("sum", 10**6), ("mean", 24 * V), ("mean_gradient", 7 * V), ("mean", 5 * V), ("sum", 1)],
)
def test_equals_plain_cross_entropy(reduction, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
    states, head, batch = make()
    value, gradient = value_and_gradient(NextTokenLoss("dataset", reduction), states, head, batch)
    expected_value, expected = oracle(states, head, batch.labels, reduction)
    assert value == pytest.approx(expected_value, rel=1e-6)
    assert relative_error(gradient, expected) < 1e-6
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"function": "log_odds"}])
def test_other_losses_equal_torch(options):
    states, head, batch = make()
    value, gradient = value_and_gradient(NextTokenLoss("dataset", **options), states, head, batch)
    wide = torch.tensor(states, requires_grad=True)
    labelled = batch.labels[:, 1:] != -100
    logits = (wide @ torch.tensor(head).T)[:, :-1][labelled]
    targets = torch.tensor(batch.labels[:, 1:][labelled], dtype=torch.int64)
    if "function" in options:
        p = logits.softmax(-1).gather(-1, targets[:, None])
        expected = -torch.log(p / (1 - p)).sum()
    else:
        expected = torch.nn.functional.cross_entropy(
            logits, targets, label_smoothing=0.2, reduction="sum"
        )
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradient, wide.grad.numpy()) < 1e-6


@pytest.mark.parametrize("labels", ["dataset", "sampled"])
def test_unlabelled_positions_get_no_loss(labels):
    states, head, batch = make()
    _, gradient = value_and_gradient(NextTokenLoss(labels, "mean"), states, head, batch)
    labelled = np.pad(batch.labels[:, 1:] != -100, ((0, 0), (0, 1)))
    assert (np.abs(gradient).max(-1) > 0)[labelled].all()
    assert not gradient[~labelled].any()


def test_large_logits_do_not_overflow():
    states, head, batch = make()
    value, gradient = value_and_gradient(NextTokenLoss("dataset"), 100 * states, head, batch)
    expected_value, expected = oracle(100 * states, head, batch.labels)
    assert value == pytest.approx(expected_value, rel=1e-5)
    assert relative_error(gradient, expected) < 1e-5


def test_sampled_labels_do_not_move_with_batch_padding_or_chunk(monkeypatch):
    states, head, batch = make(vocabulary=40)
    loss = NextTokenLoss("sampled", seed=3)
    _, expected = value_and_gradient(loss, states, head, batch)

    # Rows in another order, two more positions of padding, and a row that only fills up.
    order = [2, 0, 1]
    wide = np.pad(states[order], ((0, 1), (0, 2), (0, 0)), constant_values=0.5)
    padded = Batch(
        np.pad(batch.tokens[order], ((0, 1), (0, 2))),
        np.pad(batch.labels[order], ((0, 1), (0, 2)), constant_values=-100),
        np.pad(batch.position_mask[order], ((0, 1), (0, 2))),
        np.array([*order, -1], np.int32),
    )
    for chunk in (10**6, 40 * 5):
        monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
        _, gradient = value_and_gradient(loss, wide, head, padded)
        assert relative_error(gradient[:3, :8], expected[order]) < 1e-6
        assert not gradient[3].any() and not gradient[:, 8:].any()

    one = Batch(*(x[1:2] for x in batch))
    _, gradient = value_and_gradient(loss, states[1:2], head, one)
    assert relative_error(gradient, expected[1:2]) < 1e-6


def test_other_seeds_and_documents_draw_other_labels():
    states, head, batch = make(vocabulary=40)
    _, first = value_and_gradient(NextTokenLoss("sampled", seed=3), states, head, batch)
    _, seed = value_and_gradient(NextTokenLoss("sampled", seed=4), states, head, batch)
    moved = batch._replace(document=batch.document + 1)
    _, document = value_and_gradient(NextTokenLoss("sampled", seed=3), states, head, moved)
    assert relative_error(seed, first) > 0.1
    assert relative_error(document, first) > 0.1


def test_sampled_gradients_follow_from_the_labels_drawn():
    states, head, batch = make(vocabulary=40)
    loss = NextTokenLoss("sampled", seed=5)
    _, gradient = value_and_gradient(loss, states, head, batch)
    n, s = batch.tokens.shape
    logits = (states @ head.T).astype(np.float32).reshape(n * s, -1)
    document, position = np.divmod(np.arange(n * s, dtype=np.int32), np.int32(s))
    drawn = draw(logits, document, position, seed=5)
    labels = np.full((n, s + 1), -100)
    labels[:, 1:] = drawn.reshape(n, s)
    labels = np.where(np.pad(batch.labels != -100, ((0, 0), (0, 1))), labels, -100)[:, :s]
    assert relative_error(gradient, oracle(states, head, labels)[1]) < 1e-6


@pytest.mark.parametrize("vocabulary", [1, 2, 37, 49, 50])
def test_draws_follow_softmax(vocabulary):
    count = 20_000
    random = np.random.default_rng(vocabulary)
    logits = 1.5 * random.standard_normal(vocabulary)
    document, position = np.divmod(np.arange(count, dtype=np.int32), np.int32(100))
    rows = np.broadcast_to(logits.astype(np.float32), (count, vocabulary))
    drawn = draw(rows, document, position, seed=0)
    seen = np.bincount(drawn, minlength=vocabulary)
    assert len(seen) == vocabulary
    if vocabulary == 1:
        return
    expected = count * scipy.special.softmax(logits)
    assert scipy.stats.chisquare(seen, expected).pvalue > 1e-3
    # Softmax a hundredth off in every logit already fails, so the test has the power it needs.
    if vocabulary > 2:
        wrong = count * scipy.special.softmax(1.1 * logits)
        assert scipy.stats.chisquare(seen, wrong).pvalue < 1e-3
    # Neighbouring positions are independent, and so are neighbouring documents.
    halves = drawn.reshape(200, 100) > drawn.mean()
    for one, other in ((halves[:, :-1], halves[:, 1:]), (halves[:-1], halves[1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.03


def test_a_draw_is_a_function_of_seed_document_and_position():
    random = np.random.default_rng(0)
    logits = random.standard_normal((60, 23)).astype(np.float32)
    document = random.integers(0, 5, 60, dtype=np.int32)
    position = np.arange(60, dtype=np.int32)
    drawn = draw(logits, document, position, seed=7)
    some = np.array([41, 3, 17])
    np.testing.assert_array_equal(
        draw(logits[some], document[some], position[some], seed=7), drawn[some]
    )
    for other in (
        draw(logits, document + 1, position, seed=7),
        draw(logits, document, position + 1, seed=7),
        draw(logits, document, position, seed=8),
    ):
        assert (other != drawn).mean() > 0.5


# Option of JAX, what it is when nobody sets it, and what somebody may set it to.
CONFIGURATIONS = [
    ("jax_enable_x64", False, True),
    ("jax_default_prng_impl", "threefry2x32", "rbg"),
    ("jax_default_prng_impl", "threefry2x32", "unsafe_rbg"),
    ("jax_threefry_partitionable", True, False),
    ("jax_high_dynamic_range_gumbel", False, True),
    ("jax_random_seed_offset", 0, 5),
]


@contextlib.contextmanager
def configured(option, default, value):
    jax.config.update(option, value)
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update(option, default)
        jax.clear_caches()


def rows_to_draw(count=200, vocabulary=37):
    random = np.random.default_rng(vocabulary)
    rows = np.arange(count, dtype=np.int32)
    return 3 * random.standard_normal((count, vocabulary)), rows % 5, rows


# Drawn while labels still came from `jax.random`, which nobody had configured.
RECORDED = [
    29, 11, 29, 31, 23, 33, 25, 13, 12, 4, 25, 15,
    21, 4, 32, 29, 3, 18, 17, 31, 36, 14, 0, 29,
]  # fmt: skip


def test_a_replayed_run_draws_the_labels_that_were_recorded():
    logits, document, position = rows_to_draw(24)
    drawn = draw(logits.astype(np.float32), document, position, seed=7)
    assert drawn.tolist() == RECORDED


@pytest.mark.parametrize(("option", "default", "value"), CONFIGURATIONS)
def test_labels_do_not_move_with_jaxs_configuration(option, default, value):
    logits, document, position = rows_to_draw()
    narrow = logits.astype(np.float32)
    expected = draw(narrow, document, position, seed=2**32 - 1)
    with configured(option, default, value):
        found = draw(narrow, document, position, seed=2**32 - 1)
        # What `jax.random` itself draws does move, which is why none of it is used.
        theirs = jax.random.gumbel(jax.random.split(jax.random.key(3))[0], (9,))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32
    ours = jax.random.gumbel(jax.random.split(jax.random.key(3))[0], (9,))
    assert theirs.dtype != ours.dtype or (np.asarray(theirs) != np.asarray(ours)).all()


def test_labels_do_not_move_with_the_models_precision():
    logits, document, position = rows_to_draw(2000)
    narrow = logits.astype(np.float32)
    expected = draw(narrow, document, position, seed=1)
    with configured("jax_enable_x64", False, True):
        for wide in (narrow.astype(np.float64), logits):
            np.testing.assert_array_equal(draw(wide, document, position, seed=1), expected)


def test_noise_is_that_of_jax_as_nobody_configured_it():
    key = jax.random.key(11)
    for number in (0, 5, 2**31 - 1):
        ours = noise.fold_in(noise.key_of(11), number)
        theirs = jax.random.fold_in(key, number)
        np.testing.assert_array_equal(ours, jax.random.key_data(theirs))
        for count in (1, 8, 225):
            np.testing.assert_array_equal(
                jax.jit(noise.gumbel, static_argnums=1)(ours, count),
                jax.jit(lambda k, n=count: jax.random.gumbel(k, (n,), jnp.float32))(theirs),
            )
