"""What can be wrong with a fold, found before the model is traced and said in one line.

A fold is called with abstract arrays at each linear, as on a single device that has the whole
batch; nothing is computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jhessians.capture.documents import PerDocument, PerDocumentJointly
from jhessians.capture.fold import Context, Fold, JointFold
from jhessians.capture.problem import Problem
from jhessians.capture.site import Operands, Site, Statistics
from jhessians.errors import FoldError
from jhessians.typing import Array, PyTree

UNKNOWN_POSITIONS = 2  # stands for those of a batch without a mask, which only the model knows


def require_shapes(fold: Fold | JointFold, problem: Problem) -> None:
    """Check that a fold's statistics are arrays with rows.

    Args:
        fold: What will be summed.
        problem: Holds the linears.

    Raises:
        FoldError: If the fold is a class or can't be hashed, or one of its statistics is a scalar,
            of whole numbers or no `jax.ShapeDtypeStruct`.
        ValueError: If the problem has no linears.
    """
    if not problem.sites:
        raise ValueError(
            "there are no linears to fit; expected sites, as find_sites finds them in a model made "
            "with linears"
        )
    try:
        hash(fold)
    except TypeError:
        raise FoldError(
            f"{fold_name(fold)} can't be hashed; expected a frozen dataclass with hashable fields"
        ) from None
    if isinstance(fold, JointFold):
        _check_shapes(f"{fold_name(fold)}.shapes", fold.shapes())
        return
    for site in problem.sites.values():
        _check_shapes(f"{fold_name(fold)}.{_words(fold)[1]} at {site.name}", fold.shapes(site))


def require_fit(
    fold: Fold | JointFold,
    problem: Problem,
    statistics: Statistics,
    *,
    documents: int,
    positions: int | None,
    operands: Operands | None,
) -> None:
    """Check a fold's terms, operands and statistics against one another, at every linear.

    Args:
        fold: What will be computed.
        problem: Linears and devices.
        statistics: The running sums.
        documents: How many a batch has, on all devices together.
        positions: Columns of the batch's mask; None if it has none.
        operands: Further arrays that the fold reads, by site.

    Raises:
        FoldError: As `require_shapes`; or if a term is not what `shapes` says, an operand is
            missing, or the statistics are those of another fold or of other linears.
        ValueError: If there are no linears, or the documents can't be divided among the devices.
    """
    require_shapes(fold, problem)
    devices = problem.mesh.size if problem.mesh else 1
    if documents % devices:
        raise ValueError(
            f"the batch has {documents} documents for {devices} devices; expected a multiple of "
            "the devices: fill it up with documents none of whose positions count"
        )
    name, (term, shapes) = fold_name(fold), _words(fold)
    for site in problem.sites.values():
        where = f"{name}.{term} at {site.name}"
        computed = _term_shapes(fold, site, problem, documents, positions, operands or {}, where)
        if isinstance(fold, JointFold):
            expected = fold.row_shapes(documents, positions or UNKNOWN_POSITIONS)
        else:
            expected = fold.shapes(site)
            stack = () if site.members is None else (len(site.members),)
            _check_statistics(name, site.name, expected, statistics, stack, devices)
        _check_same(where, computed, expected, f"{name}.{shapes}")
    if isinstance(fold, JointFold):
        _check_statistics(name, fold.joint, fold.shapes(), statistics, (), devices)
        rows = fold.row_shapes(documents, positions or UNKNOWN_POSITIONS)
        finished = jax.eval_shape(fold.finish_rows, rows)
        _check_same(f"{name}.finish_rows", finished, fold.shapes(), f"{name}.shapes")


def fold_name(fold: Any) -> str:
    """The name of a fold's class, for messages; of a wrapped one, that of the fold inside."""
    wrapped = isinstance(fold, PerDocument | PerDocumentJointly)
    return type(fold.fold if wrapped else fold).__name__


def _words(fold: Any) -> tuple[str, str]:
    """What a fold's author calls a term, and the shapes that it must have."""
    if isinstance(fold, PerDocument):
        return "document_rows", "document_shapes"
    return "term", "row_shapes" if isinstance(fold, JointFold) else "shapes"


def _check_shapes(where: str, shapes: PyTree) -> None:
    leaves = jax.tree.leaves(shapes)
    if not leaves:
        raise FoldError(f"{where} has no statistic; expected at least one array")
    for leaf in leaves:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            raise FoldError(f"{where} has {leaf!r}; expected a jax.ShapeDtypeStruct")
        if not leaf.shape:
            raise FoldError(
                f"{where} has a scalar; expected arrays with rows: give a single number shape (1,)"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise FoldError(f"{where} has numbers of type {leaf.dtype}; expected a floating type")


class _Operands(dict[str, Any]):
    """The operands of a linear, which say what is missing."""

    def __init__(self, operands: Mapping[str, Any], where: str):
        super().__init__(operands)
        self.where = where

    def __missing__(self, key: str) -> Any:
        there = f"only {sorted(self)}" if self else "none"
        raise FoldError(
            f"{self.where} needs the operand {key!r}, but has {there}; expected it in operands, by "
            "site"
        )


def _term_shapes(
    fold: Any,
    site: Site,
    problem: Problem,
    documents: int,
    positions: int | None,
    operands: Operands,
    where: str,
) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes of what the fold computes at a linear."""
    width = (positions or UNKNOWN_POSITIONS) * getattr(site, "calls", 1)
    number_format = _number_format(problem.model)
    a, g = (
        jax.ShapeDtypeStruct((documents, width, features), number_format)
        for features in (site.in_features, site.out_features)
    )
    # An expert reads some of the positions: it always has a mask.
    masked = positions is not None or site.routed
    mask = jax.ShapeDtypeStruct((documents, width), jnp.bool) if masked else None
    here = {**operands.get(site.input_site, {}), **operands.get(site.name, {})}
    if site.members is not None:  # the fold gets those of one linear
        here = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), here)

    def term(a: Array, g: Array, mask: Array | None, here: Mapping[str, Any]) -> PyTree[Array]:
        return fold.term(site, a, g, _Operands(here, where), Context(mask=mask))

    # The number formats are a guess: whether they fit is for the pass itself to find.
    with jax.numpy_dtype_promotion("standard"):
        try:
            return jax.eval_shape(term, a, g, mask, here)
        except Exception as error:
            error.add_note(f"({where}, for a {_form(a)} and g {_form(g)})")
            raise


def _number_format(model: nnx.Module) -> Any:
    """That of the model's first weights."""
    arrays = jax.tree.leaves(nnx.state(model))
    formats = (x.dtype for x in arrays if hasattr(x, "dtype"))
    return next((each for each in formats if jnp.issubdtype(each, jnp.floating)), jnp.float32)


def _check_statistics(
    name: str,
    key: str,
    shapes: PyTree,
    statistics: Statistics,
    stack: Sequence[int],
    devices: int,
) -> None:
    def kept(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        rows = -(-x.shape[0] // devices) * devices
        return jax.ShapeDtypeStruct((*stack, rows, *x.shape[1:]), x.dtype)

    if key not in statistics:
        raise FoldError(
            f"the statistics have nothing of {key}; expected what initialize gives for {name} and "
            "this problem"
        )
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), statistics[key])
    _check_same(f"the statistics of {key}", given, jax.tree.map(kept, shapes), f"{name}")


def _check_same(where: str, given: PyTree, expected: PyTree, whose: str) -> None:
    """Compare structures and shapes; of number formats, only that numbers are real."""
    forms = {str(jax.tree.structure(x)) for x in (given, expected)}
    if len(forms) > 1:
        raise FoldError(f"{where} gives {_form(given)}; expected {_form(expected)} as {whose} says")
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(given)]
    for path, one, other in zip(paths, *map(jax.tree.leaves, (given, expected)), strict=True):
        if one.shape != other.shape:
            raise FoldError(
                f"{where}{path} has shape {list(one.shape)}; expected {list(other.shape)} as "
                f"{whose} says"
            )
        if not jnp.issubdtype(one.dtype, jnp.floating) and not np.can_cast(one.dtype, other.dtype):
            raise FoldError(
                f"{where}{path} has numbers of type {one.dtype}; expected {other.dtype} as {whose} "
                "says"
            )


def _form(tree: PyTree) -> str:
    """Shapes in the structure that holds them."""
    return str(jax.tree.map(lambda x: list(x.shape), tree))
