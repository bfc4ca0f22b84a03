"""Options of `apply`; no JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jhessians.config.inversion import InversionOptions
from jhessians.config.machine import ConsoleOptions
from jhessians.config.numbers import NUMBERS
from jhessians.config.option import check, option, options_of, plain_dict
from jhessians.errors import ConfigError

SOURCES = "what to run on"


@dataclass(frozen=True)
class ApplyConfig(ConsoleOptions, InversionOptions):
    """Options of `apply`; those of the inverse are bergson's."""

    out: str = ""

    hessian: str | None = option(
        None,
        "Folder of the Hessian, of Kronecker factors or an autocorrelation Hessian, made by "
        "jhessians or bergson.",
        group=SOURCES, metavar="PATH", default_text="required",
    )  # fmt: skip
    gradients: str | None = option(
        None, "Folder of the gradient store, made by jhessians or bergson.",
        group=SOURCES, metavar="PATH", default_text="required",
    )  # fmt: skip
    precision: str = option(
        "fp32", "Number format of the products and of what is stored; bergson's is fp32.",
        group=NUMBERS, choices=("fp32", "fp64"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for each in options_of(type(self)):
            object.__setattr__(self, each.name, check(each, getattr(self, each.name)))

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return self.precision == "fp64"

    def validate(self) -> None:
        """Raise ConfigError unless all folders are named and the inverse makes sense."""
        if not self.out.strip():
            raise ConfigError("OUT is empty; give the folder to write")
        for name in ("hessian", "gradients"):
            if not (getattr(self, name) or "").strip():
                raise ConfigError(f"--{name} is missing; give the folder")
        if self.ev_correction and self.inversion == "factored_tikhonov":
            raise ConfigError(
                "--inversion factored_tikhonov needs eigenvalues that are products of the "
                "factors', which those of --ev_correction are not; leave one of them out"
            )

    def resolved_dict(self) -> dict[str, Any]:
        """Every option under its name, in plain YAML types."""
        return plain_dict(self)
