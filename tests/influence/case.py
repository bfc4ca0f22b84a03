"""A tiny model with documents, queries and EKFAC factors, and the same numbers in float64 numpy."""

from dataclasses import replace
from functools import cached_property

import numpy as np

import jhessians
from jhessians.capture.sites import unshared
from tests import small

LENGTHS = [9, 5, 2, 12, 7, 3, 8, 4, 1, 11]
QUERIES = [6, 10, 3]


class Case:
    """What a test of scores needs; `devices` says on how many it computes.

    Args:
        devices: Virtual ones.
        token_batch_size: Of the documents' batches.
        changes: Of `small.decoder`.
    """

    def __init__(self, devices=1, token_batch_size=64, **changes):
        self.model = small.decoder(**changes)
        self.documents, queries = small.documents(LENGTHS), small.documents(QUERIES, seed=5)
        plan = {"devices": devices, "token_batch_size": token_batch_size, "max_shapes": 3}
        self.batches = small.batches(self.documents, **plan)
        self.queries = small.batches(queries, devices=devices)
        loss = jhessians.NextTokenLoss("dataset")
        sites = jhessians.find_sites(loss, self.model, self.batches[0], include_bias=True)
        mesh = jhessians.make_mesh(devices) if devices > 1 else None
        self.problem = jhessians.Problem(loss, self.model, sites, mesh=mesh)

    @cached_property
    def factors(self):
        """EKFAC's, with all kinds."""
        return jhessians.fit(self.problem, self.batches, documents=len(LENGTHS))

    @cached_property
    def gradients(self):
        """Module → documents' gradients."""
        return self._gradients(self.batches, len(LENGTHS))

    @cached_property
    def query_gradients(self):
        """Module → queries' gradients."""
        return self._gradients(self.queries, len(QUERIES))

    def _gradients(self, batches, documents):
        found = jhessians.document_gradients(self.problem, batches, documents=documents)
        return {name: x.astype(np.float64) for name, x in found.items()}

    @property
    def unshared(self):
        """The problem with statistics of the input at each linear."""
        return replace(self.problem, sites=unshared(self.problem.sites))

    def score(self, **options):
        """`jhessians.score` of everything."""
        options = {"documents": len(LENGTHS), "factors": self.factors} | options
        return jhessians.score(self.problem, self.batches, self.queries, **options)


def inverse(factors, module, invert):
    """V → (H + damping)⁻¹ V in float64; `invert` makes multipliers of eigenvalues."""
    q_s, q_a = (
        factors[f"{side}_eigenvectors"][module].astype(np.float64)
        for side in ("gradient", "activation")
    )
    multiplier = invert(factors["eigenvalue_correction"][module].astype(np.float64))
    return lambda v: q_s @ (multiplier * (q_s.T @ v @ q_a)) @ q_a.T


def damped(factor=0.01):
    """1 / (λ + factor · mean)."""
    return lambda values: 1 / (values + factor * values.mean())


def products(left, right, factors=None, invert=None):
    """Module → ⟨left_n, H⁻¹ right_k⟩, [n, k]; without factors plain ones."""
    return {
        module: np.einsum(
            "noi,koi->nk",
            left[module],
            right[module] if factors is None else inverse(factors, module, invert)(right[module]),
        )
        for module in left
    }


def total(products):
    """Of all modules."""
    return sum(products.values())
