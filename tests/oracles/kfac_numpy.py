"""Kronecker-factored curvature restated in float64 numpy, one linear layer at a time.

Layout: a document is (a [position, in], g [position, out]), the layer's input and the loss gradient
at its output; weights are [out, in]; eigenvectors are columns, eigenvalues ascend. With a bias,
`a` has a last column of ones from the start (`with_bias`), so nothing below knows about biases.

References:
    Martens and Grosse 2015, arXiv:1503.05671; George et al. 2018, arXiv:1806.03884;
    Grosse et al. 2023, arXiv:2308.03296.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Document = tuple[np.ndarray, np.ndarray]


def with_bias(documents: Sequence[Document]) -> list[Document]:
    """The documents with a last column of ones in every `a`."""
    return [(np.concatenate([a, np.ones((len(a), 1))], axis=1), g) for a, g in documents]


def position_mask(length: int) -> np.ndarray:
    """Positions that count: every one of a document except its last. Independent of labels."""
    mask = np.ones(length, dtype=bool)
    mask[-1:] = False
    return mask


def covariances(
    documents: Sequence[Document], masks: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Raw sums over masked positions.

    Args:
        documents: (a [S, I], g [S, O]) each.
        masks: [S] booleans each; `position_mask` where omitted.

    Returns:
        A = Σ a aᵀ [I, I], S = Σ g gᵀ [O, O] and the number of positions summed.
    """
    masks = [position_mask(len(a)) for a, _ in documents] if masks is None else masks
    a = np.concatenate([a[mask] for (a, _), mask in zip(documents, masks, strict=True)])
    g = np.concatenate([g[mask] for (_, g), mask in zip(documents, masks, strict=True)])
    a, g = a.astype(np.float64), g.astype(np.float64)
    return a.T @ a, g.T @ g, len(a)


def eigendecomposition(covariance: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending eigenvalues [d] and eigenvectors [d, d] (columns) of (C + Cᵀ) / (2 count)."""
    covariance = np.asarray(covariance, np.float64)
    return np.linalg.eigh((covariance + covariance.T) / (2 * max(count, 1)))


def kronecker_eigenvalues(
    lambda_s: np.ndarray, lambda_a: np.ndarray, count: int, n_docs: int
) -> np.ndarray:
    """λ_S ⊗ λ_A · count / n_docs [O, I]: per-document curvature from per-position averages."""
    return np.outer(lambda_s, lambda_a) * (count / n_docs)


def factor_eigenvalues(values: np.ndarray, count: int, n_docs: int) -> np.ndarray:
    """One factor's share of `kronecker_eigenvalues`: λ · sqrt(count / n_docs)."""
    return values * np.sqrt(count / n_docs)


def weight_gradient(document: Document) -> np.ndarray:
    """One document's gradient of the weight, Σ over positions of g aᵀ, [O, I]."""
    a, g = document
    return g.astype(np.float64).T @ a.astype(np.float64)


def eigenvalue_correction(
    documents: Sequence[Document], q_s: np.ndarray, q_a: np.ndarray, n_docs: int
) -> np.ndarray:
    """Λ = Σ over documents of (Q_Sᵀ G Q_A)² / n_docs, [O, I]."""
    rotated = (q_s.T @ weight_gradient(document) @ q_a for document in documents)
    return sum(gradient**2 for gradient in rotated) / n_docs


def apply_damped_inverse(
    gradient: np.ndarray,
    q_s: np.ndarray,
    q_a: np.ndarray,
    eigenvalues: np.ndarray,
    damping_factor: float,
) -> np.ndarray:
    """(Q_S ⊗ Q_A) diag(1 / (λ + damping_factor · mean λ)) (Q_S ⊗ Q_A)ᵀ vec(G), as [..., O, I].

    Args:
        gradient: [..., O, I].
        q_s: [O, O].
        q_a: [I, I].
        eigenvalues: λ or its correction Λ, [O, I].
        damping_factor: Relative to the mean over the whole spectrum.
    """
    damped = eigenvalues + damping_factor * eigenvalues.mean()
    return q_s @ ((q_s.T @ gradient @ q_a) / damped) @ q_a.T


def exact_layer_fisher(a_list: Sequence[np.ndarray], g_list: Sequence[np.ndarray]) -> np.ndarray:
    """Σ over documents of vec(G) vec(G)ᵀ, [O·I, O·I], with vec row-major: index o·I + i."""
    gradients = np.stack(
        [weight_gradient(document).ravel() for document in zip(a_list, g_list, strict=True)]
    )
    return gradients.T @ gradients


def kronecker_fisher(q_s: np.ndarray, q_a: np.ndarray, eigenvalues: np.ndarray) -> np.ndarray:
    """The dense matrix that eigenvectors and eigenvalues stand for, [O·I, O·I], vec row-major."""
    basis = np.kron(q_s, q_a)
    return (basis * eigenvalues.ravel()) @ basis.T


def factored_hessian(
    documents: Mapping[str, Sequence[Document]], n_docs: int
) -> dict[str, dict[str, np.ndarray]]:
    """Every folder of a factored Hessian directory, as `tests.oracles.bergson.read` returns it.

    Eigenvectors are only defined up to sign, and not even that where eigenvalues coincide: compare
    what they reconstruct, or put one side's eigenvectors into `eigenvalue_correction`.

    Args:
        documents: Module -> its documents, `with_bias` already where wanted.
        n_docs: Documents in the data set, those too short to count included.
    """
    folders: dict[str, dict[str, np.ndarray]] = {}

    def put(folder: str, module: str, value: np.ndarray) -> None:
        folders.setdefault(folder, {})[module] = value

    for module, module_documents in documents.items():
        activation, gradient, count = covariances(module_documents)
        lambda_a, q_a = eigendecomposition(activation, count)
        lambda_s, q_s = eigendecomposition(gradient, count)
        put("activation_sharded", module, activation)
        put("gradient_sharded", module, gradient)
        put("eigen_activation_sharded", module, q_a)
        put("eigen_gradient_sharded", module, q_s)
        put("eigenvalue_sharded", module, kronecker_eigenvalues(lambda_s, lambda_a, count, n_docs))
        put(
            "eigenvalue_correction_sharded",
            module,
            eigenvalue_correction(module_documents, q_s, q_a, n_docs),
        )
        put("factor_eig_a", module, factor_eigenvalues(lambda_a, count, n_docs))
        put("factor_eig_g", module, factor_eigenvalues(lambda_s, count, n_docs))
    return folders
