"""Options of `--method autocorrelation`; no JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass

from jhessians.config.option import Option, option, options_of
from jhessians.errors import ConfigError

AUTOCORRELATION = "statistics of --method autocorrelation"

HEAD_AXIS = 2  # the features' of [document, position, feature]


@dataclass(frozen=True)
class AutocorrelationOptions:
    """How gradients become rows, of which the dense Hessian is the mean outer product."""

    projection_dim: int = option(
        0,
        "Project every module's gradient to a matrix of this many rows and columns, or all of "
        "them, with the global target, to one vector of this length.",
        group=AUTOCORRELATION,
        metavar="P",
        minimum=0,
        default_text="0, no projection",
        bergson="index_cfg.projection_dim",
    )
    projection_type: str = option(
        "rademacher",
        "Entries of the random projection: plus or minus 1, or normal.",
        group=AUTOCORRELATION,
        choices=("rademacher", "normal"),
        bergson="index_cfg.projection_type",
    )
    projection_scale: str = option(
        "jl",
        "Divide the projection by the square root of its dimension, which keeps lengths (jl), or "
        "make each of its rows a unit vector.",
        group=AUTOCORRELATION,
        choices=("jl", "row_norm"),
        bergson="index_cfg.projection_scale",
    )
    projection_target: str = option(
        "per_module",
        "One Hessian per module, or one of the sum of the modules' projections.",
        group=AUTOCORRELATION,
        choices=("per_module", "global"),
        bergson="index_cfg.projection_target",
    )
    projection_seed: int | None = option(
        None,
        "Seed of the projection; another seed gives other matrices.",
        group=AUTOCORRELATION,
        value_type="integer",
        metavar="N",
        minimum=0,
        maximum=2**63 - 1,
        default_text="none, as bergson's",
        bergson="index_cfg.projection_seed",
    )
    reshape_to_square: bool = option(
        False,
        "Record this option of bergson's, which in 2.5.1 changes no number there, nor here.",
        group=AUTOCORRELATION,
        bergson="index_cfg.reshape_to_square",
    )
    attribute_tokens: bool = option(
        False,
        "Sum over the gradients of tokens instead of over those of documents.",
        group=AUTOCORRELATION,
        bergson="index_cfg.attribute_tokens",
    )
    split_attention_modules: tuple[str, ...] = option(
        (),
        "Modules to split into heads, each with a Hessian of its own: names or globs.",
        group=AUTOCORRELATION,
        metavar="GLOB",
        default_text="none",
        bergson="index_cfg.split_attention_modules",
    )
    num_heads: int = option(
        0,
        "Heads of the modules that are split.",
        group=AUTOCORRELATION,
        metavar="N",
        unit="heads",
        minimum=0,
        bergson="index_cfg.attention.num_heads",
    )
    head_size: int = option(
        0,
        "Output features of a head.",
        group=AUTOCORRELATION,
        metavar="N",
        unit="features",
        minimum=0,
        bergson="index_cfg.attention.head_size",
    )
    head_dim: int = option(
        2,
        "Axis of the heads in gradients of [document, position, feature]: 2 is the only one that "
        "can be split.",
        group=AUTOCORRELATION,
        metavar="AXIS",
        bergson="index_cfg.attention.head_dim",
    )
    normalizer: str = option(
        "none",
        "Divide gradients by root mean squares, dense (adam) or of rank one (adafactor), which a "
        "first pass estimates from the data.",
        group=AUTOCORRELATION,
        choices=("none", "adam", "adafactor"),
    )
    optimizer_state: str | None = option(
        None,
        "Take the normalizers from a training run: torch's optimizer.pt, or an Orbax checkpoint "
        "of an optax state.",
        group=AUTOCORRELATION,
        metavar="PATH",
        default_text="none",
        bergson="index_cfg.optimizer_state",
    )

    def check_together(self) -> None:
        """Refuse options that contradict each other, or that say nothing where they stand.

        Raises:
            ConfigError: The first clash found.
        """
        self._check_projection()
        self._check_heads()
        if self.normalizer != "none" and self.optimizer_state is not None:
            raise ConfigError(
                f"--normalizer {self.normalizer} is estimated from the data, while "
                "--optimizer_state reads it from a file; give one"
            )

    def _check_projection(self) -> None:
        if self.reshape_to_square and self.projection_target == "global":
            raise ConfigError(
                "--reshape_to_square reshapes a module's gradient, while --projection_target "
                "global flattens it; give one"
            )
        if not self.projection_dim:
            for each in self._given():
                if each.name.startswith("projection_") or each.name == "reshape_to_square":
                    raise ConfigError(
                        f"--{each.name} says nothing without a projection; "
                        "add --projection_dim, such as 16"
                    )

    def _check_heads(self) -> None:
        sizes = [name for name in ("num_heads", "head_size") if not getattr(self, name)]
        if self.split_attention_modules and sizes:
            raise ConfigError(
                f"--split_attention_modules needs --{sizes[0]}; num_heads x head_size is the "
                "modules' number of output features"
            )
        if not self.split_attention_modules:
            for each in self._given():
                if each.name in ("num_heads", "head_size", "head_dim"):
                    raise ConfigError(
                        f"--{each.name} says nothing without --split_attention_modules; name the "
                        "modules, or leave it out"
                    )
        if self.head_dim != HEAD_AXIS:
            raise ConfigError(
                f"--head_dim {self.head_dim} is no axis of features; heads are split along axis "
                f"{HEAD_AXIS} of [document, position, feature]: leave it out"
            )

    def _given(self) -> list[Option]:
        """The options that are not as they are by default."""
        own = options_of(AutocorrelationOptions)
        return [each for each in own if getattr(self, each.name) != each.default]
