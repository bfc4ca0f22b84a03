"""Influence scores in float64 with every matrix written out: qᵀ (H + D)⁻¹ g.

Gradients come from torch's autograd (`capture`), a document at a time; H is a dense matrix for each
module, [O·I, O·I] with vec row-major, or what a projection leaves of it. Meant for layers of a
hundred or so inputs and outputs at most, one module at a time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.oracles import capture, kfac_numpy

Gradients = dict[str, np.ndarray]


def gradients(
    model_dir: str | Path,
    token_lists: Sequence[Sequence[int]],
    label_lists: Sequence[Sequence[int]] | None = None,
    *,
    loss_reduction: str = "sum",
    include_bias: bool = False,
    per_token: bool = False,
) -> Gradients:
    """Module → gradients of the weight, [document, O, I].

    Args:
        model_dir: Checkpoint folder.
        token_lists: Token ids of each document.
        label_lists: Labels of each document, the tokens themselves where omitted.
        loss_reduction: See `capture.document_loss`.
        include_bias: Give modules with a bias a last column for it.
        per_token: [position, O, I] instead: every position's g aᵀ of all documents in turn, each
            document without its last position.
    """
    captured = capture.captured(model_dir, token_lists, label_lists, loss_reduction=loss_reduction)
    biased = capture.has_bias(model_dir) if include_bias else {}
    result = {}
    for module, documents in captured.items():
        pairs = kfac_numpy.with_bias(documents) if biased.get(module) else documents
        if per_token:
            result[module] = np.concatenate([np.einsum("so,si->soi", g, a)[:-1] for a, g in pairs])
        else:
            result[module] = np.stack([kfac_numpy.weight_gradient(pair) for pair in pairs])
    return result


def spectrum(
    eigenvalues: np.ndarray, *, inversion: str = "damped_inverse", damping_factor: float = 0.1
) -> np.ndarray:
    """What an inversion makes of eigenvalues; c is the damping factor, the mean over all of them.

    `factored_tikhonov` is not a function of the eigenvalues: see `factored_tikhonov`.
    """
    eigenvalues = np.maximum(eigenvalues, 0.0)
    damping = damping_factor * eigenvalues.mean()
    if inversion == "damped_inverse":
        return 1 / (eigenvalues + damping)
    if inversion == "absolute_damped_inverse":
        return 1 / (eigenvalues + damping_factor)
    if inversion == "tikhonov_filtered":
        return eigenvalues / (eigenvalues**2 + damping**2)
    if inversion == "pseudoinverse":
        kept = eigenvalues > damping
        return np.where(kept, 1 / np.where(kept, eigenvalues, 1.0), 0.0)
    raise ValueError(f"inversion is {inversion!r}")


def inverse_of(matrix: np.ndarray, *, half: bool = False, **options) -> np.ndarray:
    """The matrix whose eigenvalues an inversion has replaced; `half` for its square root."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    inverted = spectrum(values, **options)
    return (vectors * (np.sqrt(inverted) if half else inverted)) @ vectors.T


def factored_hessians(factors: Mapping[str, Mapping[str, np.ndarray]], *, ev_correction: bool):
    """Module → dense [O·I, O·I], of factors as `bergson.read` gives them."""
    eigenvalues = factors[f"eigenvalue_{'correction_' * ev_correction}sharded"]
    return {
        module: kfac_numpy.kronecker_fisher(
            factors["eigen_gradient_sharded"][module],
            factors["eigen_activation_sharded"][module],
            each,
        )
        for module, each in eigenvalues.items()
    }


def factored_tikhonov(
    factors: Mapping[str, Mapping[str, np.ndarray]], *, damping_factor: float = 0.1
) -> dict[str, np.ndarray]:
    """Module → dense inverse of (S + √d/π) ⊗ (A + π √d), whose damping is split over the factors.

    With d = damping_factor · mean λ and π = √(mean λ_A / mean λ_S). Multiplied out it is
    λ_S λ_A + π √d λ_S + (√d / π) λ_A + d in the eigenbasis.
    """
    result = {}
    for module, lambda_a in factors["factor_eig_a"].items():
        lambda_s = factors["factor_eig_g"][module]
        lambda_a, lambda_s = np.maximum(lambda_a, 0), np.maximum(lambda_s, 0)
        root = np.sqrt(damping_factor * factors["eigenvalue_sharded"][module].mean())
        pi = np.sqrt(lambda_a.mean() / lambda_s.mean())
        damped = np.outer(lambda_s + root / pi, lambda_a + pi * root)
        result[module] = kfac_numpy.kronecker_fisher(
            factors["eigen_gradient_sharded"][module],
            factors["eigen_activation_sharded"][module],
            1 / damped,
        )
    return result


def autocorrelations(documents: Gradients, n_docs: int) -> dict[str, np.ndarray]:
    """Module → Σ over documents of vec(G) vec(G)ᵀ / n_docs."""
    flat = {module: _flat(each) for module, each in documents.items()}
    return {module: each.T @ each / n_docs for module, each in flat.items()}


def scores(
    documents: Gradients,
    queries: Gradients,
    inverses: Mapping[str, np.ndarray] | None,
    *,
    aggregation: str = "none",
) -> np.ndarray:
    """Σ over modules of q H⁻¹ g, [document, query].

    Args:
        documents: Gradients of the documents, or of their positions.
        queries: Gradients of the queries.
        inverses: Module → dense inverse; None for the identity.
        aggregation: `none`, or `mean` or `sum` over the queries.
    """
    total = sum(
        _flat(each) @ (_flat(queries[module]) @ inverses[module]).T
        if inverses is not None
        else _flat(each) @ _flat(queries[module]).T
        for module, each in documents.items()
    )
    if aggregation == "none":
        return total
    return getattr(np, aggregation)(total, axis=1, keepdims=True)


def cosines(
    documents: Gradients,
    queries: Gradients,
    roots: Mapping[str, np.ndarray] | None,
    *,
    aggregation: str = "none",
) -> np.ndarray:
    """Scores of `unit_normalize`: both sides times H^-1/2, then divided by their lengths.

    Args:
        documents: Gradients of the documents, or of their positions.
        queries: Gradients of the queries.
        roots: Module → square root of the dense inverse; None for the identity.
        aggregation: Of the queries, after they were normalized.
    """
    sides = []
    for side in (documents, queries):
        rows = [_flat(each) @ roots[module] if roots else _flat(each)
                for module, each in side.items()]  # fmt: skip
        joined = np.concatenate(rows, axis=1)
        sides.append(joined / np.maximum(np.linalg.norm(joined, axis=1, keepdims=True), 1e-12))
    total = sides[0] @ sides[1].T
    if aggregation == "none":
        return total
    return getattr(np, aggregation)(total, axis=1, keepdims=True)


def self_influence(documents: Gradients, inverses: Mapping[str, np.ndarray] | None) -> np.ndarray:
    """Σ over modules of g H⁻¹ g, [document]."""
    flat = {module: _flat(each) for module, each in documents.items()}
    return sum(
        np.einsum("di,di->d", each @ inverses[module] if inverses is not None else each, each)
        for module, each in flat.items()
    )


def _flat(each: np.ndarray) -> np.ndarray:
    return each.reshape(len(each), -1).astype(np.float64)
