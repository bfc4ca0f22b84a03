"""What a method is, and what it is given to fit. `table.py` finds those of the other files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:  # JAX takes seconds to import: --help must not wait for it
    import numpy as np

    from jhessians.capture.fold import Fold, JointFold
    from jhessians.capture.problem import Problem
    from jhessians.capture.site import Site
    from jhessians.data.batches import Batches
    from jhessians.fitting.arithmetic import Work
    from jhessians.fitting.checkpoints import Checkpoints
    from jhessians.fitting.reporting import Reporter
    from jhessians.interop.export import Destination
    from jhessians.interop.optimizer_state import Parameter


@dataclass(frozen=True)
class NoOptions:
    """The own options of a method that has none."""


class PlannedPass(NamedTuple):
    """A pass over the data that has not begun.

    Attributes:
        problem: The linears that it records.
        fold: What is computed at each of them.
        operands: Shapes of what the fold reads besides, by site.
        dtype: Number format in which the fold multiplies; None for the model's.
    """

    problem: Problem
    fold: Fold | JointFold
    operands: Mapping[str, Any]
    dtype: np.dtype | None = None


@dataclass(frozen=True)
class Run:
    """One fit.

    Attributes:
        problem: Loss, model, the linears to record and the devices.
        batches: The data set, to go through as often as there are passes.
        options: The method's own options, an instance of `Method.options`.
        correct_eigenvalues: Whether the eigenvalue correction is wanted.
        partitions: Groups in which the linears are fitted, one after the other.
        dtype: Number format of the sums.
        include_bias: Whether biases count as one more input of the linears that have one.
        destination: The folder to write into, and how.
        progress: Is told of stages, notes and warnings.
        parameters: Lists the parameters of torch's model, as its optimizer numbers them.
        kept: Where the fit's state is saved, and from where an earlier one is continued.
    """

    problem: Problem
    batches: Batches
    options: Any
    correct_eigenvalues: bool
    partitions: int
    dtype: np.dtype
    include_bias: bool
    destination: Destination
    progress: Reporter
    parameters: Callable[[], Sequence[Parameter]]
    kept: Checkpoints


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way to approximate the Hessian.

    Attributes:
        name: As typed after `--method`.
        summary: What it is, in a few words for `--help`.
        formula: What is summed, for README's table.
        cost: Multiplications for each token and module besides the model's own, for that table.
        disk: Numbers on disk for each module, likewise.
        papers: arXiv identifiers.
        bergson: What bergson calls it in `hessian_cfg.method`; None if bergson lacks it.
        options: A dataclass of its own options (`jhessians.config.option`).
        rank: Its place in lists; the first one is the default.
        product: What comes out, in the plural, for the summary.
        factored: Whether it is made of Kronecker factors, rather than of dense Grams.
        ev_correction: Whether the eigenvalue correction belongs to it.
        labels: Where labels come from unless an option says otherwise.
        mean_reduction: How `--loss_reduction mean` scales gradients, as `NextTokenLoss` names it.
    """

    name: str
    summary: str
    formula: str
    cost: str
    disk: str
    papers: tuple[str, ...]
    bergson: str | None = None
    options: type = NoOptions
    rank: int = 100
    ev_correction: bool = False
    product: ClassVar[str]
    factored: ClassVar[bool]
    labels: ClassVar[Literal["sampled", "dataset"]]
    mean_reduction: ClassVar[Literal["mean", "mean_gradient"]]

    @abstractmethod
    def fit(self, run: Run) -> None:
        """Fit the Hessian and write it.

        Raises:
            NumericsError: If a loss or a statistic isn't finite.
            OutputError: If the disk is full, read-only or not ours.
            ConfigError: If the options don't fit the model.
        """

    def settled(self, options: Any, modules: Sequence[str]) -> dict[str, Any]:
        """Its own options that the names of the model's modules settle, by name.

        Returns:
            Option → value, for those that the modules decide; by default none.

        Raises:
            ConfigError: If an option doesn't fit the modules.
        """
        return {}

    def shares_inputs(self, options: Any) -> bool:
        """Whether linears that read the same array have one activation matrix."""
        return True

    @abstractmethod
    def flop(self, work: Work, options: Any) -> dict[str, float]:
        """FLOP that each pass needs besides going through the model, by the stage's name."""

    @abstractmethod
    def passes(
        self, problem: Problem, options: Any, dtype: np.dtype, *, correct_eigenvalues: bool
    ) -> dict[str, PlannedPass]:
        """Every pass over the data, in order, by the stage's name; `plan` traces one step of each.

        Args:
            problem: Loss, linears, a model of shapes and a mesh that may be abstract.
            options: The method's own.
            dtype: Number format of the sums.
            correct_eigenvalues: Whether the eigenvalue correction is wanted.
        """

    @abstractmethod
    def between_bytes(
        self,
        sites: Mapping[str, Site],
        options: Any,
        dtype: np.dtype,
        *,
        devices: int,
        hosts: int,
    ) -> int:
        """Bytes of statistics on each device while matrices are eigendecomposed, at most.

        Args:
            sites: The linears that are fitted at once.
            options: The method's own.
            dtype: Number format of the sums.
            devices: Over which rows are spread, of all hosts.
            hosts: Between which matrices move.
        """

    @abstractmethod
    def matrix_sizes(self, sites: Mapping[str, Site], options: Any) -> list[int]:
        """Rows of every matrix that is eigendecomposed."""

    @abstractmethod
    def result_numbers(
        self, sites: Mapping[str, Site], options: Any, *, correct_eigenvalues: bool
    ) -> int:
        """How many numbers the finished fit has on disk."""

    @abstractmethod
    def statistics_bytes(
        self, sites: Mapping[str, Site], options: Any, dtype: np.dtype, *, partitions: int
    ) -> int:
        """Bytes of all devices' statistics that are in memory at a time.

        Args:
            sites: The linears.
            options: The method's own.
            dtype: Number format of the statistics.
            partitions: Groups in which the linears are fitted, one after the other.
        """
