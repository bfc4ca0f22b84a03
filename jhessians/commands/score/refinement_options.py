"""Options of `score` that refine the inverse of the Hessian's factors. No JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jhessians.config.inversion import INVERSE, REFINABLE
from jhessians.config.option import option, options_of
from jhessians.errors import ConfigError

NONE = "none"
CG, SGD = "cg", "sgd"


@dataclass(frozen=True)
class RefinementOptions:
    """How far the inverse of the Hessian's factors is refined."""

    refine: str = option(
        NONE,
        "From the factors' inverse of each query go on to that of the Gauss-Newton Hessian itself, "
        "with the same damping: scores that know more than any Kronecker factors. By conjugate "
        "gradients on some documents (cg), or by gradient descent with momentum on other documents "
        "at each step (sgd, ASTRA); a step takes about three passes over its documents for each "
        "query.",
        group=INVERSE, choices=(NONE, CG, SGD),
    )  # fmt: skip
    refine_steps: int | None = option(
        None, "At most so many steps.",
        group=INVERSE, value_type="integer", metavar="N", unit="steps", minimum=1,
        default_text="20 of cg, 200 of sgd",
    )  # fmt: skip
    refine_documents: int | None = option(
        None,
        "The Gauss-Newton Hessian is that of so many documents, drawn from the training data, the "
        "same for all queries: once for cg, for each step of sgd.",
        group=INVERSE, value_type="integer", metavar="B", unit="documents", minimum=1,
        default_text="256 for cg, 16 for sgd",
    )  # fmt: skip
    refine_tolerance: float = option(
        0.001, "A query is done when its residual, relative to its gradient, isn't larger.",
        group=INVERSE, metavar="T", minimum=0.0,
    )  # fmt: skip
    refine_seed: int = option(
        0, "Of the documents that are drawn.",
        group=INVERSE, metavar="SEED", minimum=0,
    )  # fmt: skip


@dataclass(frozen=True)
class DescentOptions:
    """How gradient descent goes on; names and defaults are those of bergson's `astra`."""

    refine_lr: float = option(
        0.01, "sgd: length of a step. A query whose steps are too long keeps the best that it had.",
        group=INVERSE, metavar="X", minimum=0.0,
    )  # fmt: skip
    refine_momentum: float = option(
        0.9, "sgd: what a step keeps of those before.",
        group=INVERSE, metavar="X", minimum=0.0, maximum=1.0,
    )  # fmt: skip
    refine_lr_decay: float = option(
        0.9, "sgd: multiplies --refine_lr every --refine_lr_decay_interval steps.",
        group=INVERSE, metavar="X", minimum=0.0, maximum=1.0,
    )  # fmt: skip
    refine_lr_decay_interval: int = option(
        100, "sgd: see --refine_lr_decay.",
        group=INVERSE, metavar="N", unit="steps", minimum=1,
    )  # fmt: skip
    refine_held_documents: int = option(
        64,
        "sgd: residuals and objectives are measured on so many documents, at most half of all, "
        "that no step takes.",
        group=INVERSE, metavar="N", unit="documents", minimum=1,
    )  # fmt: skip
    refine_measure_interval: int = option(
        10, "sgd: they are measured after so many steps; the best that was measured is kept.",
        group=INVERSE, metavar="N", unit="steps", minimum=1,
    )  # fmt: skip


REFINEMENT = options_of(RefinementOptions) + options_of(DescentOptions)


def check_refinement(config: Any, *, loss: str) -> None:
    """Refuse what can't be refined.

    Args:
        config: Of `score`.
        loss: The run's loss function.

    Raises:
        ConfigError: The first clash found.
    """
    if config.refine == NONE:
        for each in REFINEMENT:
            if getattr(config, each.name) != each.default:
                how = SGD if each in options_of(DescentOptions) else f"{CG} or {SGD}"
                raise ConfigError(f"--{each.name} is given without --refine; give --refine {how}")
        return
    if config.refine != SGD:
        for each in options_of(DescentOptions):
            if getattr(config, each.name) != each.default:
                raise ConfigError(f"--{each.name} is for --refine sgd; leave it out")
    for name, excluded in (("refine_lr", 0), ("refine_lr_decay", 0), ("refine_momentum", 1)):
        if getattr(config, name) == excluded:
            expected = "less than 1" if excluded else "more than 0"
            raise ConfigError(f"--{name} is {excluded}; expected {expected}")
    if config.inversion not in REFINABLE:
        raise ConfigError(
            f"--inversion is {config.inversion}, which adds no multiple of the identity; --refine "
            f"expects {' or '.join(REFINABLE)}"
        )
    if loss == "log_odds":
        raise ConfigError(
            "--refine is for cross-entropy, whose Gauss-Newton Hessian is known, but --loss_fn is "
            "log_odds; leave one of them out"
        )
    for name in ("self", "unit_normalize"):
        if getattr(config, name):
            raise ConfigError(
                f"--refine solves for queries, but --{name} wants every document solved for, too; "
                f"leave --{name} out"
            )
