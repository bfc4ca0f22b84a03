"""Where normalizers of gradient rows come from: an optimizer, a pass over the data, or nowhere."""

from collections.abc import Callable, Sequence

from jhessians.capture.problem import Problem
from jhessians.data.batches import Batches
from jhessians.fitting.checkpoints import Checkpoints
from jhessians.fitting.passes import run_pass
from jhessians.fitting.reporting import Reporter
from jhessians.folds.normalizers import Normalizer
from jhessians.folds.second_moment import SecondMoment
from jhessians.interop.optax_state import is_orbax
from jhessians.interop.optimizer_state import Parameter, load_normalizers
from jhessians.typing import DTypeLike


def make_normalizers(
    problem: Problem,
    batches: Batches,
    *,
    kind: str = "none",
    optimizer_state: str | None = None,
    parameters: Callable[[], Sequence[Parameter]],
    include_bias: bool,
    dtype: DTypeLike,
    progress: Reporter,
    kept: Checkpoints | None = None,
) -> dict[str, Normalizer]:
    """Those of an optimizer, those of a pass over the data, or none.

    Args:
        problem: Loss, model, linears and devices.
        batches: The data set, which is gone through to estimate.
        kind: `adam` or `adafactor` estimates such, `none` doesn't.
        optimizer_state: Where a training run left its optimizer's state; None for nowhere.
        parameters: Lists the parameters of torch's model, as its optimizer numbers them.
        include_bias: Whether biases count.
        dtype: Number format of the sums.
        progress: Where the stage is shown.
        kept: Where sums are saved, and from where they are continued.

    Returns:
        Module's full name → its normalizer; of an optimizer, of the modules that it has.

    Raises:
        CheckpointError: If the optimizer's state can't be read or has other shapes.
        NumericsError: If a loss isn't finite.
    """
    if optimizer_state is not None:
        read = load_normalizers(
            optimizer_state,
            model=problem.model,
            parameters=() if is_orbax(optimizer_state) else parameters(),
            include_bias=include_bias,
        )
        modules = {name for site in problem.sites.values() for name in site.module_names()}
        return {name: each for name, each in read.items() if name in modules}
    if kind == "none":
        return {}
    documents = batches.documents
    fold = SecondMoment(factored=kind == "adafactor", dtype=dtype)
    with progress.stage("Normalizers", documents.positions, "positions") as stage:
        sums = run_pass(
            fold, problem, batches, dtype=dtype, advance=stage.advance,
            kept=(kept or Checkpoints()).series("normalizers"),
        )  # fmt: skip
        return fold.finish(problem.sites, sums, documents=len(documents))
