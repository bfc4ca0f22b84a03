"""`apply`: an inverse Hessian times the gradients of a store.

`config.py` holds its options, `pipeline.py` the work.
"""

from __future__ import annotations

from jhessians.commands.apply.config import ApplyConfig
from jhessians.commands.command import Command, Positional


def run(config: ApplyConfig) -> str:
    """Multiply, write, and return the last line."""
    # jax takes long to import: --help must not wait for it.
    from jhessians.commands.apply.pipeline import apply

    return apply(config).render()


DESCRIPTION = """\
Multiply the gradients of a store by the inverse of a Hessian, of Kronecker
factors or dense, and write a store of the same form, such as queries for
bergson score. Both may be jhessians' or bergson's.
"""
EXAMPLES = """\
  jhessians apply runs/preconditioned --hessian runs/kfac --gradients runs/query
  jhessians apply runs/preconditioned --hessian runs/dense --gradients runs/query \\
      --inversion pseudoinverse --damping_factor 0.01
"""

APPLY = Command(
    name="apply",
    summary="multiply a store's gradients by an inverse Hessian",
    usage="OUT --hessian PATH --gradients PATH [options]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=ApplyConfig,
    positionals=(
        Positional("out", "Folder to write; must not exist yet.",
                   "jhessians apply runs/out --hessian runs/kfac --gradients runs/query"),
    ),
    run=run,
    compiles=True,
)  # fmt: skip
