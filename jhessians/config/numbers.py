"""Options of number formats, of products and of random numbers; no JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass

from jhessians.config.option import option
from jhessians.devices.precision import HIGHEST, MATMUL_PRECISIONS
from jhessians.errors import ConfigError

NUMBERS = "numbers"

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")


@dataclass(frozen=True)
class PrecisionOptions:
    """In which numbers a model computes."""

    precision: str = option(
        "fp32",
        "Number format of the model's weights and activations.",
        group=NUMBERS,
        choices=PRECISIONS,
        bergson="index_cfg.precision",
    )
    matmul_precision: str = option(
        HIGHEST,
        "How float32 numbers are multiplied: in full (highest) or, on GPU and TPU, faster and less "
        "exactly: split into parts, as so many products (bf16_x6, tf32_x3, bf16_x3), or rounded "
        "(tf32, bf16).",
        group=NUMBERS,
        metavar="HOW",
        choices=tuple(MATMUL_PRECISIONS),
    )

    def check_together(self) -> None:
        """Refuse a precision of products where numbers are not float32.

        Raises:
            ConfigError: The first clash found.
        """
        # XLA would round 64 bits to these as well, and widen 16 bits to no end.
        require_float32_products(self.matmul_precision, "precision", self.precision, ("fp32",))


@dataclass(frozen=True)
class NumberOptions(PrecisionOptions):
    """In which numbers a fit computes."""

    hessian_dtype: str = option(
        "fp32",
        "Number format in which statistics are summed and stored; eigendecompositions always "
        "run in fp64.",
        group=NUMBERS,
        choices=PRECISIONS,
        bergson="hessian_cfg.hessian_dtype",
    )
    seed: int = option(
        0,
        "Seed of the labels that are sampled from the model.",
        group=NUMBERS,
        metavar="N",
        minimum=0,
        maximum=2**32 - 1,
    )

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return "fp64" in (self.precision, self.hessian_dtype)

    def check_together(self) -> None:
        """Refuse a precision of products where sums are in 64 bits.

        Raises:
            ConfigError: The first clash found.
        """
        require_float32_products(
            self.matmul_precision, "hessian_dtype", self.hessian_dtype, ("fp32", "bf16", "fp16")
        )


def require_float32_products(
    matmul_precision: str, name: str, value: str, float32: tuple[str, ...]
) -> None:
    """Refuse a precision of products where numbers are not float32.

    Args:
        matmul_precision: The precision.
        name: An option that names a number format.
        value: What it names.
        float32: Those of its values whose products are of float32 numbers.

    Raises:
        ConfigError: If they clash.
    """
    if matmul_precision != HIGHEST and value not in float32:
        raise ConfigError(
            f"--matmul_precision {matmul_precision} is for products of float32 "
            f"numbers, not for --{name} {value}; leave one of them out"
        )
