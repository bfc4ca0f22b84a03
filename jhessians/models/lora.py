"""Low-rank adapters (LoRA): two narrow linears beside a frozen one.

References:
    Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rank-stabilised scale).
"""

from flax import nnx

from jhessians.capture.tape import Tapped
from jhessians.models.layers import Linear, at_least_float32
from jhessians.typing import Array, DTypeLike, Float


class LoRA(nnx.Module):
    """scale · (x A) B, to be set as a `Linear`'s `adapter`; A and B are linears of their own.

    Args:
        in_features: I, of the linear.
        out_features: O, of the linear.
        rank: r.
        scale: Of the output.
        name: What A's and B's names begin with, before `.lora_A` and `.lora_B`; by default their
            paths are their names.
        suffix: What those names end with.
        members: The layers of a stack that have the adapter, ascending; elsewhere A and B are
            zero and not recorded. Default all.
        dtype: Of the parameters.
        rngs: Seeds A and B.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scale: float,
        name: str | None = None,
        suffix: str = "",
        members: tuple[int, ...] | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def linear(inputs: int, outputs: int, part: str) -> Linear:
            own = None if name is None else f"{name}.{part}{suffix}"
            made = Linear(inputs, outputs, use_bias=False, name=own, dtype=dtype, rngs=rngs)
            made.members = members
            return made

        self.lora_A = linear(in_features, rank, "lora_A")
        self.lora_B = linear(rank, out_features, "lora_B")
        self.scale = scale

    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
        y = self.lora_B(self.lora_A(x))
        # In a wide type, for a scale such as alpha / sqrt(r) is no number of bfloat16.
        return (y.astype(at_least_float32(y.dtype)) * self.scale).astype(y.dtype)


def freeze(model: nnx.Module) -> None:
    """Let no linear of `model` be recorded; those of adapters that are added later are."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Tapped) and not module.scans:
            module.frozen = True
