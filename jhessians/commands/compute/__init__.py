"""`compute`: fit the Hessian approximation of a model on a data set.

`config.py` holds its options, `pipeline.py` the work; `next_steps.py` says what a user may do with
the result.
"""

from __future__ import annotations

from jhessians.commands.command import Command, Positional
from jhessians.commands.compute.config import ComputeConfig

DESCRIPTION = """\
Fit a language model's Hessian, Kronecker-factored or dense, and write it as
torch bergson reads it. Without --model and --dataset a small embedded demo is
used.
"""
EXAMPLES = """\
  jhessians compute runs/demo
  jhessians compute runs/pythia --model EleutherAI/pythia-160m \\
      --dataset NeelNanda/pile-10k --max_tokens 1000000 --truncation
"""


def run(config: ComputeConfig) -> str | None:
    """Fit, write, and return the summary for a terminal; None where another host says it."""
    # jax and transformers take seconds to import: --help must not wait for them.
    from jhessians.commands.compute.pipeline import compute, is_first_host
    from jhessians.report.summary import render

    summary = compute(config)
    return render(summary) if is_first_host() else None


COMPUTE = Command(
    name="compute",
    summary="fit a Hessian approximation of a model on a data set",
    usage="RUN_PATH [--model NAME --dataset NAME] [options]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=ComputeConfig,
    positionals=(
        Positional(
            "run_path", "Folder to write; must not exist yet.", "jhessians compute runs/demo"
        ),
    ),
    run=run,
    replays=True,
    compiles=True,
)
