"""`plan`: what a fit will take of machines that need not be there.

`config.py` holds its options; `fit.py` has the model as shapes and the data as lengths;
`pipeline.py` plans; `words.py` says it; `compiled.py` asks the TPU's own compiler.
"""

from __future__ import annotations

from jhessians.commands.command import Command, Positional
from jhessians.commands.plan.config import PlanConfig

DESCRIPTION = """\
Say what a fit will take before anything is rented: memory of every device and
host, arithmetic, traffic, time and disk, stage by stage, and what to change where
it doesn't fit. Reads the model's config alone, no weights, and takes seconds.
Takes the options of compute, and plans what compute would do with them.
"""
EXAMPLES = """\
  jhessians plan meta-llama/Meta-Llama-3-8B --topology v5e:4x4 --precision bf16 --fsdp
  jhessians plan ./checkpoint --devices 8xH100 --dataset data.jsonl
  jhessians plan ./checkpoint --memory 24GB --module_partitions auto
  jhessians plan ./checkpoint --topology v5p:2x2x2 --fsdp --compile
"""


def run(config: PlanConfig) -> str | None:
    """Plan, and return what the terminal shows."""
    # jax and transformers take seconds to import: --help must not wait for them.
    from jhessians.commands.plan.pipeline import plan

    return plan(config)


PLAN = Command(
    name="plan",
    summary="say what a fit will take of machines that need not be there",
    usage="MODEL [--topology T | --devices NxKIND | --memory SIZE] [options]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=PlanConfig,
    positionals=(
        Positional("model", "Hugging Face Hub name or local folder of the checkpoint, of which the "
                   "config is read.", "jhessians plan ./checkpoint"),
    ),
    run=run,
    shows=True,
)  # fmt: skip
