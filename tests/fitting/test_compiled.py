"""What XLA makes of a pass: memory in place, no weight gradients, few compilations, one collective.

The numbers are right in other tests; these keep them cheap.
"""

import logging
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.fitting import passes
from jhessians.fitting.passes import Pass
from tests import small

I, O = 40, 24  # noqa: E741


class Blocks(nnx.Module):
    """A scanned stack of gated-free MLPs, wide enough that factors outweigh activations."""

    def __init__(self, width, layers, rngs):
        def create(rngs):
            return jhessians.Linear(width, width, rngs=rngs)

        self.stack = jhessians.Stack(create, layers, rngs=rngs)

    def __call__(self, x):
        return self.stack(x)


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.first = jhessians.Linear(I, O, rngs=rngs)
        self.second = jhessians.Linear(O, I, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def half_square(model, batch):
    return 0.5 * jnp.sum(model(batch) ** 2)


def random_batch(n, s, i):
    return np.random.default_rng(0).standard_normal((n, s, i)).astype(np.float32)


def lower(model, batch, *, fold=None, mesh=None):
    """The step of a pass, lowered, and the statistics that it updates."""
    sites = jhessians.find_sites(half_square, model, batch)
    problem = jhessians.Problem(half_square, model, sites, mesh=mesh)
    one = Pass(fold or jhessians.Covariance(), problem)
    statistics = one.initialize()
    return one.lower(batch, statistics), statistics


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("devices", [1, 8])
def test_sums_are_updated_in_place(devices):
    width, layers = 128, 16
    model = small.fill(lambda: Blocks(width, layers, nnx.Rngs(0)))
    mesh = jhessians.make_mesh(8) if devices > 1 else None
    lowered, statistics = lower(model, random_batch(8, 1, width), mesh=mesh)
    memory = lowered.compile().memory_analysis()
    per_device = nbytes(statistics) // devices
    one_layer = 2 * width * width * 4  # both factors, before their rows are scattered
    assert per_device >= layers * one_layer // devices
    assert memory.alias_size_in_bytes >= per_device
    # All else is a layer's factors and the activations: there is no second stack of factors.
    assert memory.temp_size_in_bytes < (nbytes(statistics) // 2 if devices == 1 else 6 * one_layer)


def test_donated_buffers_are_those_that_come_back():
    data = small.batches(small.documents([9, 5, 7]))
    model = small.decoder(layers=1)
    loss = jhessians.NextTokenLoss("dataset")
    problem = jhessians.Problem(loss, model, jhessians.find_sites(loss, model, data[0]))
    graph, state = nnx.split(model)

    @partial(jax.jit, donate_argnums=1)
    def step(state, statistics, batch):
        here = problem.of(nnx.merge(graph, state))
        return jhessians.accumulate(jhessians.Covariance(), here, batch, statistics)[0]

    before = jhessians.initialize(jhessians.Covariance(), problem)
    where = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), before)
    after = step(state, before, data[0])
    assert jax.tree.map(lambda x: x.unsafe_buffer_pointer(), after) == where
    assert all(x.is_deleted() for x in jax.tree.leaves(before))


def test_a_pass_donates_its_sums(monkeypatch):
    made = []

    def remember(*args, **options):
        made.append(jhessians.initialize(*args, **options))
        return made[-1]

    monkeypatch.setattr(passes, "initialize", remember)
    model, batch = small.fill(lambda: Pair(nnx.Rngs(0))), random_batch(2, 3, I)
    sites = jhessians.find_sites(half_square, model, batch)
    problem = jhessians.Problem(half_square, model, sites)
    jhessians.run_pass(jhessians.Covariance(), problem, [batch])
    assert all(x.is_deleted() for x in jax.tree.leaves(made[0]))


def product_shapes(text):
    """Result shape of every matrix product in a lowered module."""
    found = re.findall(r"stablehlo\.dot_general.*-> tensor<([\dx]+)xf32>", text)
    return [tuple(map(int, shape.split("x"))) for shape in found]


def test_there_are_no_weight_gradients():
    model, batch = small.fill(lambda: Pair(nnx.Rngs(0))), random_batch(2, 8, I)
    shapes = product_shapes(lower(model, batch)[0].as_text())
    weights = {(I, O), (O, I)}
    assert not weights & set(shapes)
    # Two products forward, two back (of which XLA drops the data's), and four Grams.
    grams = [shape for shape in shapes if len(shape) == 2]
    assert sorted(grams) == sorted([(I, I), (O, O), (O, O), (I, I)])
    assert len(shapes) - len(grams) == 4

    # With them, the same search finds them.
    graph, state = nnx.split(model)
    gradient = jax.jit(jax.grad(lambda s, b: half_square(nnx.merge(graph, s), b)))
    shapes = product_shapes(gradient.lower(state, jnp.asarray(batch)).as_text())
    assert weights & set(shapes)


def collectives(text, kind):
    """Elements of the largest result of every collective of one kind in compiled HLO."""
    sizes = []
    for result in re.findall(rf"= (.*?) {kind}(?:-start)?\(", text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        sizes.append(max(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes))
    return sizes


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_factors_are_reduced_and_scattered_in_one(shape):
    model, batch = small.fill(lambda: Pair(nnx.Rngs(0))), random_batch(8, 2, I)
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=auto)
    text = lower(model, batch, mesh=mesh)[0].compile().as_text()
    scattered = collectives(text, "reduce-scatter")
    assert len(scattered) >= len(shape)
    assert max(scattered) <= I * I // shape[0]
    assert all(size == 1 for size in collectives(text, "all-reduce"))  # the loss alone
    assert not collectives(text, "all-gather")


class Compilations(logging.Handler):
    """Counts XLA compilations by the name of what was compiled."""

    def __enter__(self):
        self.names = []
        self.context = jax.log_compiles()
        self.context.__enter__()
        self.logger = logging.getLogger("jax")
        self.logger.addHandler(self)
        return self

    def emit(self, record):
        if match := re.match(r"Finished XLA compilation of (\S+)", record.getMessage()):
            self.names.append(match[1])

    def __exit__(self, *error):
        self.logger.removeHandler(self)
        self.context.__exit__(*error)

    def count(self, name):
        return sum(name in each for each in self.names)


@pytest.mark.parametrize("devices", [1, 8])
def test_one_compilation_per_shape_and_pass(devices):
    mesh = jhessians.make_mesh(8) if devices > 1 else None
    model = small.fill(lambda: Pair(nnx.Rngs(0)))
    one, other = random_batch(8, 2, I), random_batch(8, 3, I)
    sites = jhessians.find_sites(half_square, model, one)
    problem = jhessians.Problem(half_square, model, sites, mesh=mesh)
    with Compilations() as compiled:
        jhessians.run_pass(jhessians.Covariance(), problem, [one, one, other, one, other, other])
    assert compiled.count("step") == 2


def test_compilations_do_not_grow_with_the_data():
    model = small.decoder(layers=1)
    loss = jhessians.NextTokenLoss("dataset")
    lengths = np.random.default_rng(0).integers(2, 17, 60)
    plan = {"token_batch_size": 64, "max_shapes": 2}
    counts = []
    for repeat in (1, 3):
        data = small.batches(small.documents(np.tile(lengths, repeat)), **plan)
        sites = jhessians.find_sites(loss, model, data[0])
        problem = jhessians.Problem(loss, model, sites)
        with Compilations() as compiled:
            jhessians.run_pass(jhessians.Covariance(), problem, data)
        counts.append((len(data), compiled.count("step")))
    assert counts[1][0] > 2 * counts[0][0]
    assert counts[0][1] == counts[1][1] == 1


@pytest.mark.parametrize("devices", [1, 8])
def test_the_second_pass_compiles_while_the_first_does(devices):
    """In a thread, whose compilations are not counted here: the second pass itself has none."""
    mesh = jhessians.make_mesh(8) if devices > 1 else None
    model = small.fill(lambda: Pair(nnx.Rngs(0)))
    batches = [random_batch(8, 2, I)] * 3
    sites = jhessians.find_sites(half_square, model, batches[0])
    problem = jhessians.Problem(half_square, model, sites, mesh=mesh)
    with Compilations() as compiled:
        jhessians.fit(problem, batches, positions=48, documents=24)
    assert compiled.count("step") == 1


def test_a_call_sums_several_batches(monkeypatch):
    model = small.fill(lambda: Pair(nnx.Rngs(0)))
    one, other = random_batch(8, 2, I), random_batch(8, 3, I)
    sites = jhessians.find_sites(half_square, model, one)

    def sizes(batches):
        made = Pass(jhessians.Covariance(), jhessians.Problem(half_square, model, sites))
        calls, step = [], made._step
        monkeypatch.setattr(made, "_step", lambda *args: (calls.append(args[-1]), step(*args))[1])
        made.run(batches)
        return calls

    assert sizes([one] * 20) == [1, 8, 8, 3]
    assert sizes([one] * 4 + [other] * 9) == [1, 3, 8, 1]
    # Where one batch is enough work for a call, it has a call of its own.
    monkeypatch.setattr(passes, "WORK_OF_A_CALL", 8 * 2 * I * O)
    assert sizes([one] * 3) == [1, 1, 1]
