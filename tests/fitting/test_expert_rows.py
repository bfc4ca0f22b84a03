"""Rows of documents and whole statistics of a mixture's experts, against jax.grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jhessians
from jhessians.models.config import ExpertsConfig, MLPConfig
from tests import small
from tests.small import relative_error
from tests.tolerances import FACTORS

EXPERTS, CHOSEN, LENGTHS = 3, 2, [9, 5, 2, 7]


@pytest.mark.parametrize("devices", [1, 4])
def test_experts_rows_and_counts(devices):
    mixture = ExpertsConfig(EXPERTS, CHOSEN, MLPConfig(6, "silu", "fused"))
    model, data = small.decoder(layers=1, experts=mixture), small.documents(LENGTHS)
    loss = jhessians.NextTokenLoss("dataset")
    (batch,) = batches = small.batches(data, devices=devices)
    sites = jhessians.find_sites(loss, model, batch, select=lambda name: ".down." in name)
    mesh = jhessians.make_mesh(devices) if devices > 1 else None
    problem = jhessians.Problem(loss, model, sites, mesh=mesh)

    rows = jhessians.map_documents(jhessians.DocumentGradients(), problem, batches)
    graph, state = nnx.split(model)
    for index in range(len(data)):  # the gradient of one document, the others' labels taken out
        alone = batch._replace(
            labels=np.where(batch.document[:, None] == index, batch.labels, -100),
        )
        alone = jax.tree.map(jnp.asarray, alone)
        gradients = jax.grad(lambda s, b=alone: loss(nnx.merge(graph, s), b))(state)
        kernels = gradients["layers"]["blocks"]["mlp"]["down"]["kernel"][...][0]
        for name, found in rows.items():
            expected = np.asarray(kernels[int(name.rsplit(".", 1)[1])], np.float64).T
            assert found.shape == (len(data), *expected.shape)
            if not expected.any():  # none of the document's tokens chose this expert
                assert not found[index].any()
                continue
            assert relative_error(found[index], expected) < FACTORS, (name, index)

    fold = jhessians.Covariance()
    sums = jhessians.unpack(fold, problem, jhessians.run_pass(fold, problem, batches))
    assert set(sums) == set(rows) and len(sums) == EXPERTS
    terms = [float(each["terms"]) for each in sums.values()]
    # Every position that counts was routed to CHOSEN of the experts.
    assert sum(terms) == CHOSEN * data.positions and len(set(terms)) > 1
    assert all(each["activation"].shape == (6, 6) for each in sums.values())
