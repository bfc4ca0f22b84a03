"""A whole fit, stage by stage: `fit` keeps what the stages yield, the command line exports it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jhessians.capture.problem import Problem
from jhessians.capture.sites import unshared
from jhessians.fitting.checkpoints import Checkpoints
from jhessians.fitting.counting import count
from jhessians.fitting.eigenbases import TermCounts, covariance_matrices, eigenvector_shapes
from jhessians.fitting.eigendecomposition import (
    eigendecompose_covariances,
    finish_eigenbases,
    load_eigenbases,
)
from jhessians.fitting.eigensolver import seconds_of
from jhessians.fitting.factors import Kinds, correction_tensors, covariance_tensors, eigen_tensors
from jhessians.fitting.passes import Pass, untraced
from jhessians.fitting.reporting import Reporter, Silent
from jhessians.folds.correction import EigenvalueCorrection
from jhessians.folds.covariance import Covariance, FactorFold, routed_terms
from jhessians.typing import PyTree

NO_LINEARS = "there are no linears to fit; expected sites, as find_sites finds them in a model"


def fit(
    problem: Problem,
    batches: Iterable[PyTree[np.ndarray]],
    *,
    positions: int | None = None,
    documents: int | None = None,
    method: FactorFold | None = None,
    correct_eigenvalues: bool = True,
    dtype: Any = jnp.float32,
) -> dict[str, dict[str, np.ndarray]]:
    """Kronecker factors, in memory, of any model whose linears `find_sites` finds.

    Args:
        problem: Loss, model and linears.
        batches: Read once per pass, and once more to count: a list, not an iterator. With a mesh,
            this host's rows.
        positions: How many positions count, over all batches and hosts. By default those that the
            batches' masks say, or without masks all.
        documents: How many documents there are, over all hosts. By default those in the batches, by
            their `document` numbers (negative ones are none) or else by rows; documents that are in
            no batch, such as those of one token, are not among them.
        method: The fold that sums the factors; default KFAC's `Covariance`.
        correct_eigenvalues: Whether to make the second pass, which makes KFAC EKFAC.
        dtype: Number format of the sums and of the results.

    Returns:
        Kind → module's full name → array, as `load_factors` reads it from disk:
        `activation_covariance` A [I', I'] and `gradient_covariance` S [O, O], sums over positions;
        `activation_eigenvectors` and `gradient_eigenvectors`, columns; `activation_eigenvalues`
        [I'], `gradient_eigenvalues` [O] and their outer product `eigenvalue` [O, I'], per
        document; `eigenvalue_correction` Λ [O, I'], per document.

    Raises:
        TypeError: If `batches` is an iterator, which a second pass would find empty, or this is
            called inside a caller's own jit.
        ValueError: If there are no linears.
        NumericsError: If a loss or a covariance isn't finite.
    """
    if isinstance(batches, Iterator):
        raise TypeError("batches is an iterator; expected something to iterate twice, as a list")
    fold = method or Covariance(jnp.dtype(dtype))
    terms = None
    if positions is None or documents is None or fold.unit != "position":
        if not problem.sites:
            raise ValueError(NO_LINEARS)
        counted = count(problem, untraced(problem, batches))
        terms = counted.terms(fold.unit) if positions is None or fold.unit != "position" else None
        positions = counted.positions if positions is None else positions
        documents = counted.documents if documents is None else documents
    stages = fit_stages(
        problem,
        batches,
        positions=positions,
        documents=documents,
        terms=terms,
        method=fold,
        correct_eigenvalues=correct_eigenvalues,
        dtype=dtype,
    )
    return {
        kind: {name: source.rows(0, source.shape[0]) for name, source in tensors.items()}
        for kinds in stages
        for kind, tensors in kinds.items()
    }


def fit_stages(
    problem: Problem,
    batches: Iterable[PyTree[np.ndarray]],
    *,
    positions: int,
    documents: int,
    terms: int | None = None,
    method: FactorFold,
    correct_eigenvalues: bool,
    dtype: Any,
    progress: Reporter | None = None,
    kept: Checkpoints | None = None,
) -> Iterator[Kinds]:
    """The factors, some kinds at a time, in the order in which they are computed.

    A fit that is continued leaves out the kinds that an earlier one was known to have given.

    Errors are those of `fit`. What a stage yields must be read before the next one is asked for,
    which takes its memory.

    Args:
        problem: Loss, model and linears.
        batches: Read once per pass: a list, not an iterator. With a mesh, this host's rows.
        positions: How many positions count, over all batches and hosts.
        documents: How many documents there are, over all hosts; means are over these.
        terms: How many terms `method` sums, of its `unit`; by default the positions.
        method: The fold that sums the factors.
        correct_eigenvalues: Whether to make the second pass, which makes KFAC EKFAC.
        dtype: Number format of the sums and of the results.
        progress: Where stages and warnings are shown.
        kept: Where the state is saved, and from where an earlier fit is continued.

    Yields:
        Covariances; then eigenvectors and eigenvalues; then corrected eigenvalues, if wanted.
    """
    if isinstance(batches, Iterator):
        raise TypeError("batches is an iterator; expected something to iterate twice, as a list")
    if not problem.sites:
        raise ValueError(NO_LINEARS)
    progress, kept = progress or Silent(), kept or Checkpoints()
    dtype = jnp.dtype(dtype)
    if not method.shares_inputs:
        problem = replace(problem, sites=unshared(problem.sites))
    sites = problem.sites

    total, matrices = (positions if terms is None else terms), covariance_matrices(sites)
    ended = kept.series("eigenbases", replaces="covariances")
    saved = load_eigenbases(problem, dtype, ended, total=total)
    correction = Pass(EigenvalueCorrection(dtype), problem, dtype=dtype)
    if saved is not None and saved.done == len(matrices):
        counts, bases = saved.terms, saved.bases
    else:
        ahead = seconds_of([matrix.dimension for matrix in matrices])
        sums = kept.series("covariances", ahead=ahead)
        with progress.stage("Covariances", positions, "positions") as stage:
            if correct_eigenvalues:  # while this pass compiles
                operands = eigenvector_shapes(problem, dtype)
                correction.compile_ahead(next(iter(batches)), operands)
            covariances = Pass(method, problem, dtype=dtype).run(
                batches, advance=stage.advance, kept=sums
            )
            covariances = method.finish(sites, covariances)
        counts = TermCounts(total, routed_terms(covariances))
        if unused := sum(int((routed == 0).sum()) for routed in counts.routed.values()):
            everyone = sum(len(routed) for routed in counts.routed.values())
            progress.warn(
                f"{unused} of {everyone} expert linears got no position: their factors are zero; "
                "give more data, or leave them out with `filter_modules`"
            )
        yield covariance_tensors(sites, covariances)

        with progress.stage("Eigendecompositions", len(matrices), "matrices") as stage:
            bases = eigendecompose_covariances(
                problem, covariances, terms=counts, dtype=dtype, advance=stage.advance,
                # Some pairs are of no use without the matrices of the others.
                saved=saved if sums.ended else None, kept=ended if sums.ended else None,
            )  # fmt: skip
            finish_eigenbases(bases, counts, sites, ended)
    yield eigen_tensors(sites, bases, counts, documents)

    if correct_eigenvalues:
        with progress.stage("Eigenvalue correction", positions, "positions") as stage:
            squares = correction.run(
                batches, operands=bases.vectors, advance=stage.advance,
                kept=kept.series("correction"),
            )  # fmt: skip
        yield correction_tensors(sites, squares, documents)
