"""Training as a function of the documents' weights: plain AdamW, and what weights of zero mean."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jhessians.data.batches import Batches
from jhessians.data.batching import plan_batches
from jhessians.data.documents import Documents
from jhessians.evaluation.retraining import Retraining, random_subsets
from jhessians.evaluation.training import Recipe, Training, document_losses
from jhessians.models.loss import NextTokenLoss
from tests import small

RECIPE = Recipe(epochs=2, learning_rate=1e-2, token_batch_size=64, seed=3)
LENGTHS = [5, 9, 14, 12, 16, 7, 3, 11]  # of one shape, when they are rounded


@pytest.fixture(scope="module")
def documents():
    return small.documents(LENGTHS, seed=1)


@pytest.fixture(scope="module")
def queries():
    data = small.documents([6, 8, 7], seed=2)
    labels = data.tokens.copy()
    labels[data.offsets[:-1] + 1] = -100  # not every token is asked for
    data = Documents(data.tokens, labels, data.offsets)
    return Batches(data, plan_batches(data.lengths, token_batch_size=64))


@pytest.fixture(scope="module")
def training(documents):
    return Training(small.decoder(layers=1), documents, RECIPE)


def trained(training, weights):
    step, state = jax.jit(training.step), training.start()
    for batch in training.batches():
        state = step(state, batch, jnp.asarray(weights, jnp.float32))
    return state


def losses_of(training, state, queries):
    found = np.zeros(len(queries.documents), np.float32)
    for batch in queries:
        real = batch.document >= 0
        found[batch.document[real]] = document_losses(training.model(state.parameters), batch)[real]
    return found


def test_losses_of_documents_add_up_to_the_loss(queries):
    model = small.decoder(layers=1)
    for batch in queries:
        expected = nnx.jit(NextTokenLoss("dataset"))(model, batch)
        found = document_losses(model, batch)
        assert float(found.sum()) == pytest.approx(float(expected), rel=1e-6)
        assert (np.asarray(found)[batch.document < 0] == 0).all()


def test_with_all_documents_it_is_plain_adamw(training, documents):
    """Against optax over the sum of losses that curvature is made of, over the batch's targets."""
    rate = optax.warmup_cosine_decay_schedule(0, 1e-2, training.steps // 20, training.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, eps_root=1e-8, weight_decay=0.1),
    )
    graph, parameters = nnx.split(small.decoder(layers=1))
    moments = optimizer.init(parameters)

    @jax.jit
    def step(parameters, moments, batch):
        def loss(parameters):
            total = NextTokenLoss("dataset")(nnx.merge(graph, parameters), batch)
            return total / batch.position_mask.sum()

        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(jax.grad(loss)(parameters), moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    for batch in training.batches():
        parameters, moments = step(parameters, moments, batch)
    found = trained(training, np.ones(len(documents))).parameters
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(parameters), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    assert training.steps == len(list(training.batches())) > 2


def test_a_document_of_weight_zero_is_never_seen(training, documents):
    """Its tokens can be others: nothing changes. With weight 1 much does."""
    changed = documents.tokens.copy()
    changed[documents.offsets[2] : documents.offsets[3]] = 0
    other = Documents(changed, None, documents.offsets)
    elsewhere = Training(small.decoder(layers=1), other, RECIPE)
    weights = np.ones(len(documents))
    differ = [
        max(
            float(jnp.abs(a - b).max())
            for a, b in zip(
                jax.tree.leaves(trained(training, weights).parameters),
                jax.tree.leaves(trained(elsewhere, weights).parameters),
                strict=True,
            )
        )
        for weights[2] in (1.0, 0.0)
    ]
    assert differ[0] > 1e-3 and differ[1] == 0


@pytest.mark.parametrize(("devices", "at_once"), [(1, 2), (2, 1)])
def test_many_models_are_those_of_one_at_a_time(training, queries, documents, devices, at_once):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    subsets = random_subsets(3, len(documents), 0.5, seed=0)
    runs = list(Retraining(training, queries, mesh, at_once).run(subsets))
    found = np.concatenate([each.losses for each in runs])
    expected = [losses_of(training, trained(training, subset), queries) for subset in subsets]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert found.std(0).min() > 1e-3  # or all would be alike


def test_subsets_have_one_size_and_depend_on_their_number_alone():
    subsets = random_subsets(40, 30, 0.4, seed=7)
    assert (subsets.sum(1) == 12).all()
    np.testing.assert_array_equal(random_subsets(5, 30, 0.4, seed=7), subsets[:5])
    assert abs(subsets.mean(0) - 0.4).max() < 0.25 and len(np.unique(subsets, axis=0)) == 40
    assert random_subsets(2, 3, 0.01, seed=0).sum(1).tolist() == [1, 1]


def test_metagradients_are_finite_differences(queries):
    """In float64, through all steps: clipping, moments and weight decay included."""
    path = Path(__file__).parents[2] / "examples" / "metagradient.py"
    spec = importlib.util.spec_from_file_location("metagradient", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    batch = next(iter(queries))
    with jax.enable_x64(True):
        graph, parameters = nnx.split(small.decoder(layers=1))
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), parameters)
        data = small.documents(LENGTHS[:4], seed=1)
        training = Training(nnx.merge(graph, wide), data, RECIPE)

        def losses(state):
            return document_losses(training.model(state.parameters), batch)[:2]

        def after(weights):
            state, step = training.start(), jax.jit(training.step)
            for each in training.batches():
                state = step(state, each, weights)
            return losses(state)

        weights = jnp.array([1.0, 0.8, 1.0, 0.3])
        found, values = example.metagradients(training, losses, weights)
        np.testing.assert_allclose(values, after(weights), rtol=1e-9)
        for number in range(4):
            shift = jnp.zeros(4).at[number].set(1e-5)
            expected = (after(weights + shift) - after(weights - shift)) / 2e-5
            np.testing.assert_allclose(found[:, number], expected, rtol=1e-4, atol=1e-8)
    assert np.abs(found).min() > 1e-6
