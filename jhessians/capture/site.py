"""A site: one linear layer, or all linears that have one name in a stack of layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Statistics = dict[str, Any]
"""Site's name → what the fold sums there; in stacks every array has a leading member axis."""

Operands = Mapping[str, Mapping[str, Any]]
"""Site's name → the arrays that a fold reads there, by name, such as eigenvectors."""


@dataclass(frozen=True)
class Site:
    """A linear layer, or all linears of one name in a stack of layers.

    A stack has a linear for each of its layers, or for each expert of each layer.

    Attributes:
        name: The name of the linear; in stacks `{layer}` and `{expert}` stand for numbers.
        in_features: I, how many numbers the linear reads at a position.
        out_features: O, how many it returns.
        use_bias: Whether it has a bias.
        ones: Whether the bias counts as the weight of one more input that is always one, so that
            there are I' = I + 1 inputs.
        stack: The stack's axes, each with its length, such as (("layer", 12), ("expert", 8));
            none outside a stack.
        members: Which of the stack's linears are recorded, ascending: indices into its axes
            flattened; None outside a stack.
        input_site: The name of the site that keeps the statistics of the input: this one, or an
            earlier one that reads the same array, as key and value read what query reads.
        calls: How many times one pass calls each of its linears.
    """

    name: str
    in_features: int
    out_features: int
    use_bias: bool
    ones: bool = False
    stack: tuple[tuple[str, int], ...] = ()
    members: tuple[int, ...] | None = None
    input_site: str = ""
    calls: int = 1

    @property
    def inputs(self) -> int:
        """I', the columns of `a` and of the weight gradient."""
        return self.in_features + self.ones

    @property
    def owns_input(self) -> bool:
        """Whether this site keeps the statistics of its input itself."""
        return self.input_site == self.name

    @property
    def routed(self) -> bool:
        """Whether its linears are experts' and so read only some of the positions."""
        return any(axis == "expert" for axis, _ in self.stack)

    @property
    def stack_size(self) -> int:
        """How many linears the stack has, recorded or not."""
        return math.prod(length for _, length in self.stack)

    @property
    def slots(self) -> list[int | None]:
        """The index of each of its modules on its arrays' leading axis; None outside a stack."""
        return [None] if self.members is None else list(range(len(self.members)))

    def module_names(self) -> list[str]:
        """The full names of the modules that this site stands for, in the order of its arrays."""
        if self.members is None:
            return [self.name]
        axes, lengths = zip(*self.stack, strict=True)
        indices = (np.unravel_index(member, lengths) for member in self.members)
        return [self.name.format(**dict(zip(axes, index, strict=True))) for index in indices]
