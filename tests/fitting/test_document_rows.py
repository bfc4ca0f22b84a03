"""Rows of documents against jax.grad in float64: order, devices, batches, projections, hosts."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from tests import small
from tests.small import relative_error
from tests.tolerances import FACTORS, INVARIANCE, TWIN

LENGTHS = [9, 5, 2, 12, 1, 7, 3, 8, 4]  # a single token predicts nothing: no batch has that one
MODULES = ("layers.0.mlp.up", "layers.1.attention.output")


@pytest.fixture(scope="module")
def setting():
    return small.decoder(layers=2), small.documents(LENGTHS), jhessians.NextTokenLoss("dataset")


@pytest.fixture(scope="module")
def truth(setting):
    """Module → the gradient [document, out, in + 1] of every document alone, in float64."""
    model, data, loss = setting
    found = {name: [] for name in MODULES}
    with jax.enable_x64(True):
        graph, state = nnx.split(model)
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), state)
        gradient_of = jax.jit(jax.grad(lambda s, b: loss(nnx.merge(graph, s), b)))
        # One shape for all: what stands behind a document's end changes nothing.
        for index in range(len(data)):
            tokens = np.zeros((1, max(LENGTHS)), np.int32)
            labels = np.full_like(tokens, -100)
            own, _ = data.document(index)
            tokens[0, : len(own)] = labels[0, : len(own)] = own
            mask = np.arange(max(LENGTHS))[None] < len(own) - 1
            batch = jhessians.Batch(tokens, labels, mask, np.zeros(1, np.int32))
            gradients = gradient_of(wide, jax.tree.map(jnp.asarray, batch))["layers"]["blocks"]
            for name in MODULES:
                _, layer, block, linear = name.split(".")
                weight = gradients[block][linear]
                kernel = np.asarray(weight["kernel"][...][int(layer)]).T
                bias = np.asarray(weight["bias"][...][int(layer)])
                found[name].append(np.concatenate([kernel, bias[:, None]], axis=1))
    return {name: np.stack(each) for name, each in found.items()}


def problem_of(setting, batches, devices=1):
    model, _, loss = setting
    # Few linears, since each has to be compiled.
    sites = jhessians.find_sites(
        loss, model, batches[0], include_bias=True, select=lambda name: name in MODULES
    )
    mesh = jhessians.make_mesh(devices) if devices > 1 else None
    return jhessians.Problem(loss, model, sites, mesh=mesh)


@pytest.mark.parametrize(
    ("devices", "plan"),
    [(1, {}), (7, {"token_batch_size": 16}), (8, {"token_batch_size": 12, "max_shapes": 3})],
)
def test_gradients_are_those_of_each_document_alone(setting, truth, devices, plan):
    """In the data's order, whatever that of the batches and of their rows."""
    batches = small.batches(setting[1], devices=devices, **plan)[::-1]
    turned = [jax.tree.map(lambda x: x[::-1], batch) for batch in batches]
    problem = problem_of(setting, batches, devices)
    found = jhessians.map_documents(
        jhessians.DocumentGradients(), problem, iter(turned), documents=len(LENGTHS)
    )
    norms = jhessians.map_documents(jhessians.DocumentSquaredNorms(), problem, turned)
    for name in MODULES:
        assert isinstance(found[name], np.ndarray)
        assert relative_error(found[name], truth[name]) < FACTORS
        assert relative_error(norms[name], np.square(truth[name]).sum((1, 2))) < FACTORS
        assert not found[name][LENGTHS.index(1)].any()
        # A wrong twin: the rows in the order in which the batches have them.
        order = np.concatenate([b.document[b.document >= 0] for b in turned])
        assert relative_error(truth[name][order], np.delete(truth[name], 4, axis=0)) > 0.1


@pytest.mark.parametrize("devices", [1, 7])
def test_projected_rows_are_the_projected_gradients(setting, truth, devices):
    batches = small.batches(setting[1], devices=devices)
    problem = problem_of(setting, batches, devices)
    rows = jhessians.GradientRows(jhessians.Projection(3))
    operands = jhessians.row_operands(problem, rows)
    found = jhessians.map_documents(rows, problem, batches, operands=operands)
    whole = jhessians.map_documents(jhessians.GradientRows(), problem, batches)
    for name in MODULES:
        out, inputs = truth[name].shape[1:]
        keys = [rows.projection.key(name, role) for role in ("left", "right")]
        left, right = (
            np.asarray(m, np.float64)
            for m in rows.projection.matrices(np.stack(keys), (out, inputs))
        )
        expected = np.einsum("po,noi,qi->npq", left, truth[name], right).reshape(len(LENGTHS), 9)
        assert relative_error(found[name], expected) < FACTORS
        flat = truth[name].reshape(len(LENGTHS), -1)
        assert relative_error(whole[name], flat) < FACTORS
        if devices == 1:  # each row is one document's, so that their Gram is the fold's
            gram = jhessians.Gram(rows)
            sums = jhessians.run_pass(gram, problem, batches, operands=operands)
            matrix = jhessians.unpack(gram, problem, sums)[name]
            assert relative_error(matrix, expected.T @ expected) < FACTORS


def test_rows_of_tokens_are_refused(setting):
    batches = small.batches(setting[1])
    fold = jhessians.GradientRows(tokens=True)
    with pytest.raises(jhessians.ConfigError, match="expected rows of documents: tokens=False"):
        jhessians.map_documents(fold, problem_of(setting, batches), batches)


def test_a_document_in_two_rows_is_refused(setting):
    """One of the two would be lost."""
    (batch,) = batches = small.batches(setting[1])
    problem, fold = problem_of(setting, batches), jhessians.DocumentSquaredNorms()
    with pytest.raises(ValueError, match="document 0 is in 2 rows; expected each in one"):
        jhessians.map_documents(fold, problem, [batch, batch])
    with pytest.raises(ValueError, match="there is a document 8; expected numbers below 5"):
        jhessians.map_documents(fold, problem, [batch], documents=5)


class Twice(nnx.Module):
    """A linear that is called twice, and one that is called once."""

    def __init__(self, rngs):
        self.inner, self.outer = (nnx.Linear(4, d, rngs=rngs) for d in (4, 2))

    def __call__(self, x):
        return self.outer(jnp.tanh(self.inner(jnp.tanh(self.inner(x)))))


def test_positions_are_counted_once_whatever_the_calls_and_batches(monkeypatch):
    from jhessians.fitting import counting

    def loss(model, batch):
        return jnp.sum(model(batch["x"]) ** 2)

    traces = []
    monkeypatch.setattr(
        counting, "accumulate",
        lambda *args, **options: traces.append(1) or jhessians.accumulate(*args, **options),
    )  # fmt: skip
    model, batch = Twice(nnx.Rngs(0)), {"x": np.ones((6, 3, 4), np.float32)}
    problem = jhessians.Problem(loss, model, jhessians.find_sites(loss, model, batch))
    assert counting.count(problem, [batch] * 5) == (90, 30, 30)
    assert len(traces) == 1
    ids = batch | {"document": np.array([0, 1, 2, 3, -1, -1])}
    assert counting.count(problem, [ids]) == (18, 4, 4)


@pytest.mark.parametrize("fold", [jhessians.Shampoo(), jhessians.TKFAC()])
def test_linears_that_read_the_same_input_keep_factors_of_their_own(fold):
    """Unlike KFAC's, these activation factors depend on each linear's gradients."""
    model, data = small.decoder(layers=1, **small.LLAMA), small.documents(LENGTHS)
    batches, loss = small.batches(data), jhessians.NextTokenLoss("dataset")
    sites = jhessians.find_sites(loss, model, batches[0], select=lambda name: ".attention." in name)
    assert any(not site.owns_input for site in sites.values())
    problem = jhessians.Problem(loss, model, sites)
    alone = replace(problem, sites={n: replace(s, input_site=n) for n, s in sites.items()})
    found, expected = (
        jhessians.unpack(fold, here, jhessians.run_pass(fold, here, batches))
        for here in (problem, alone)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    key, query = (found[f"layers.0.attention.{n}"]["activation"] for n in ("key", "query"))
    assert relative_error(key, query) > TWIN


def test_a_pass_over_constants_inside_a_callers_jit_says_what_to_use(setting):
    batches = small.batches(setting[1])
    problem = problem_of(setting, batches)
    for call in (
        lambda: jhessians.run_pass(jhessians.Covariance(), problem, batches),
        lambda: jhessians.fit(problem, batches),
        lambda: jhessians.map_documents(jhessians.DocumentSquaredNorms(), problem, batches),
    ):
        with pytest.raises(TypeError, match="call initialize, accumulate and unpack instead"):
            jax.jit(call)()


WORKER = """
import sys
import jax, numpy as np
port, process, hosts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if hosts > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", hosts, process)
import jhessians
from jhessians.fitting.counting import count
from tests import small
data = small.documents([9, 5, 2, 12, 1, 7, 3, 8, 4])
loss = jhessians.NextTokenLoss("dataset")
plan = jhessians.plan_batches(data.lengths, token_batch_size=16, devices=4, max_shapes=2)
batches = list(jhessians.iterate_batches(data, plan, process_index=process, process_count=hosts))
model = small.decoder(layers=1)
sites = jhessians.find_sites(loss, model, batches[0])
problem = jhessians.Problem(loss, model, sites, mesh=jhessians.make_mesh())
rows = jhessians.map_documents(jhessians.DocumentSquaredNorms(), problem, batches)
np.savez(sys.argv[4], counts=np.array(count(problem, batches)), **rows)
"""


def test_two_hosts_find_what_one_finds(tmp_path):
    """Rows and counts are those of all documents, on every host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    results = []
    for hosts in (1, 2):
        environment = {
            **os.environ,
            "XLA_FLAGS": small.xla_flags(4 // hosts),
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        files = [tmp_path / f"{hosts}-{process}.npz" for process in range(hosts)]
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, port, str(process), str(hosts), str(file)],
                env=environment, stderr=subprocess.PIPE, text=True,
            )
            for process, file in enumerate(files)
        ]  # fmt: skip
        try:
            for worker in workers:
                _, errors = worker.communicate(timeout=180)
                assert worker.returncode == 0, errors
        finally:
            for worker in workers:
                worker.kill()
        results += [dict(np.load(file)) for file in files]
    one, *two = results
    data = small.documents(LENGTHS)
    assert list(one["counts"]) == [data.positions, len(data) - 1, len(data) - 1]
    for other in two:
        np.testing.assert_array_equal(other.pop("counts"), one["counts"])
        for name, squares in other.items():
            assert relative_error(squares, one[name]) < INVARIANCE
