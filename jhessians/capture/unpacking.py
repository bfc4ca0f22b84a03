"""Statistics as whole arrays by module, without what packing, stacks and devices add to them."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jhessians.capture.fold import Fold, JointFold
from jhessians.capture.problem import Problem
from jhessians.capture.site import Site, Statistics
from jhessians.errors import FoldError
from jhessians.typing import Array, PyTree


@runtime_checkable
class PackedFold(Fold, Protocol):
    """A fold whose statistics are stored in another form than a reader wants."""

    def unpacked(self, site: Site, own: PyTree[Array], of_input: PyTree[Array]) -> PyTree[Array]:
        """The statistics of one linear in the form that `unpack` returns.

        Args:
            site: The linear.
            own: Its statistics, their rows still padded; in stacks with a leading member axis.
            of_input: Those of the linear that keeps what depends on the input alone.

        Returns:
            Whole arrays without padding, in stacks with a leading member axis.
        """
        ...


def unpack(
    fold: Fold | JointFold, sites: Problem | Mapping[str, Site], statistics: Statistics
) -> dict[str, Any]:
    """What `accumulate` or `run_pass` summed, as whole arrays by the modules' names.

    It may stand inside `jax.jit`, on a mesh or without one; on several hosts all of them call it.

    Args:
        fold: What was summed.
        sites: The linears, or the problem that has them.
        statistics: The sums. `Shampoo`, and `TKFAC` that normalizes, end with a division; it is
            made by `fold.finish(problem.sites, statistics)`, which takes and gives packed sums.

    Returns:
        Module's full name → what the fold keeps of it, without padding; linears that read the same
        input have the same activation statistics. `Covariance`, `ReducedCovariance`, `Shampoo`
        and `TKFAC` give {"activation": [I', I'], "gradient": [O, O]}, symmetric;
        `EigenvalueCorrection` [O, I']; `SecondMoment` {"weight": [O, I]}, or {"row": [O], "col":
        [I]}, and "bias": [O] where that counts; `Gram` [heads · d, d]; a fold of one's own what
        its `shapes` says. Factors of an expert have "terms", too, how many were summed. A joint
        fold's statistic stands under its own name.

    Raises:
        FoldError: If the statistics are not those of this fold and these linears.
    """
    if isinstance(sites, Problem):
        sites = sites.sites
    if isinstance(fold, JointFold):
        return {fold.joint: _cut(fold.joint, statistics, fold.shapes(), stacked=False)}
    whole = {
        name: _cut(name, statistics, fold.shapes(site), stacked=site.members is not None)
        for name, site in sites.items()
    }
    if isinstance(fold, PackedFold):
        whole = {
            name: fold.unpacked(site, whole[name], whole[site.input_site])
            for name, site in sites.items()
        }
    return {
        module: whole[name] if slot is None else _entry(whole[name], slot)
        for name, site in sites.items()
        for slot, module in zip(site.slots, site.module_names(), strict=True)
    }


def _entry(tree: PyTree[Array], slot: int) -> PyTree[Array]:
    return jax.tree.map(lambda x: x[slot], tree)


def _cut(name: str, statistics: Statistics, shapes: PyTree, *, stacked: bool) -> PyTree[Array]:
    """Statistics without the rows that were added for the devices."""
    if name not in statistics:
        raise FoldError(
            f"the statistics have nothing of {name}; expected those of this fold and these linears"
        )
    if str(jax.tree.structure(statistics[name])) != str(jax.tree.structure(shapes)):
        raise FoldError(
            f"the statistics of {name} are not what the fold keeps; expected those of this fold"
        )

    def cut(x: Array, shape: jax.ShapeDtypeStruct) -> Array:
        rows = shape.shape[0]
        if x.ndim != len(shape.shape) + stacked or x.shape[int(stacked)] < rows:
            raise FoldError(
                f"a statistic of {name} has shape {list(x.shape)}; expected {list(shape.shape)}"
                + (" behind an axis of members" if stacked else "")
            )
        x = _movable(x)
        return x[:, :rows] if stacked else x[:rows]

    return jax.tree.map(cut, statistics[name], shapes)


def _movable(x: Array) -> Array:
    """On a mesh of explicit axes no part of a sharded axis can be taken before it is whole."""
    axis_types = jax.typeof(x).sharding.mesh.axis_types
    return jax.sharding.reshard(x, P()) if AxisType.Explicit in axis_types else x
