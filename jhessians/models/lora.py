"""Low-rank adapters (LoRA): two narrow linears beside a frozen one.

References:
    Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rank-stabilised scale).
"""

from flax import nnx

from jhessians.capture.linears import Tapped
from jhessians.models.layers import Linear, at_least_float32
from jhessians.typing import Array, DTypeLike, Float


class LoRA(nnx.Module):
    """scale · (x A) B, to be set as the `adapter` of a `Linear`. A and B are recorded as linears.

    Args:
        in_features: Input features of the adapted linear.
        out_features: Output features of the adapted linear.
        rank: r, the features between A and B.
        scale: Factor on the output.
        name: Beginning of A's and B's names, before `.lora_A` and `.lora_B`; by default their
            names are their paths.
        suffix: End of these names.
        members: The layers of a stack that have the adapter, ascending, by default all. In the
            others A and B are zero and not recorded.
        dtype: Number format of the parameters.
        rngs: Draws A and B.
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
        """What is added to the output of the linear that the adapter belongs to."""
        y = self.lora_B(self.lora_A(x))
        # In a wide format: bfloat16 would round a scale such as alpha / sqrt(r).
        return (y.astype(at_least_float32(y.dtype)) * self.scale).astype(y.dtype)


def freeze(model: nnx.Module) -> None:
    """Exclude all linears of `model` from recording, but not those of adapters added later."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Tapped) and not module.scans:
            module.frozen = True
