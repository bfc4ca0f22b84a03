"""What a fold sees, and what it gives: linears, the batch on its device, terms of a sum.

a: [document, position, in], a linear's input. g: [document, position, out], the loss gradient at
its output.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jhessians.typing import Array, Float, PyTree, Shaped

Statistics = dict[str, Any]  # site name -> the fold's pytree, with a leading member axis in stacks


@dataclass(frozen=True)
class Site:
    """A linear layer, or all of a stack's linears of one name, as a fold sees it.

    A stack has a linear for each of its layers, or for each expert of each layer.

    Attributes:
        name: Its name; `{layer}` and `{expert}` stand for numbers.
        in_features: I.
        out_features: O.
        use_bias: Whether it has a bias.
        ones: Whether the bias counts as one more input, always one: I' = I + 1.
        stack: The stack's axes, each with its length, such as (("layer", 12), ("expert", 8));
            none outside a stack.
        members: Which of the stack's linears are recorded, ascending: indices into its axes
            flattened; None outside a stack.
        input_site: The site that keeps what depends on the input alone: this one, or an earlier
            one that reads the same array, as key and value do with query.
    """

    name: str
    in_features: int
    out_features: int
    use_bias: bool
    ones: bool = False
    stack: tuple[tuple[str, int], ...] = ()
    members: tuple[int, ...] | None = None
    input_site: str = ""

    @property
    def inputs(self) -> int:
        """I', the columns of `a` and of the weight gradient."""
        return self.in_features + self.ones

    @property
    def owns_input(self) -> bool:
        return self.input_site == self.name

    @property
    def routed(self) -> bool:
        """Whether its linears are experts, each of which reads some of the positions."""
        return any(axis == "expert" for axis, _ in self.stack)

    @property
    def stack_size(self) -> int:
        """How many linears the stack has, recorded or not."""
        return math.prod(length for _, length in self.stack)

    @property
    def slots(self) -> list[int | None]:
        """Where its arrays' leading axis has each of its modules; None outside a stack."""
        return [None] if self.members is None else list(range(len(self.members)))

    def module_names(self) -> list[str]:
        """The full names of the modules that this site stands for, in the order of its arrays."""
        if self.members is None:
            return [self.name]
        axes, lengths = zip(*self.stack, strict=True)
        indices = (np.unravel_index(member, lengths) for member in self.members)
        return [self.name.format(**dict(zip(axes, index, strict=True))) for index in indices]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a fold may know of the batch on its device.

    Attributes:
        mask: The positions that count, [document, position]; None if all do.
        axes: The mesh axes that rows are sharded over; none on a single device.
        shards: The product of their sizes.
        weight: Of every term; the traversal multiplies by it.
    """

    mask: Any = None
    axes: tuple[str, ...] = field(default=(), metadata={"static": True})
    shards: int = field(default=1, metadata={"static": True})
    weight: float = field(default=1.0, metadata={"static": True})

    def padded(self, rows: int) -> int:
        """`rows` rounded up to a multiple of the shards."""
        return -(-rows // self.shards) * self.shards

    def gather_rows(self, x: Shaped[Array, "local *rest"], rows: int) -> Shaped[Array, "r *rest"]:
        """All `rows` rows of an operand that is sharded by rows."""
        for axis in reversed(self.axes):
            x = lax.all_gather(x, axis, axis=0, tiled=True)
        return x[:rows]

    def scatter_rows(self, x: Float[Array, "r *rest"]) -> Float[Array, "local *rest"]:
        """This device's rows of the sum of `x` over devices."""
        if missing := self.padded(x.shape[0]) - x.shape[0]:
            x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        # One axis in turn: over several at once XLA makes it an all-reduce of the whole array.
        for axis in self.axes:
            x = lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        return x


@runtime_checkable
class Fold(Protocol):
    """A sum over documents of something that (a, g) give. One method, one file.

    A fold is a static argument of jit: make it a frozen dataclass.
    """

    def shapes(self, site: Site) -> PyTree[jax.ShapeDtypeStruct]:
        """The statistics of one linear. Every array has rows, which the mesh shards."""
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """What this device's documents add, in the structure of `shapes`.

        Args:
            site: The linear.
            a: [document, position, in], without the column of ones.
            g: [document, position, out].
            operands: Arrays that belong to this linear, such as its eigenvectors, sharded by rows.
            context: Mask and mesh.
        """
        ...


@runtime_checkable
class JointFold(Protocol):
    """A fold to whose rows, one or more for each document, every linear adds its share.

    Its statistic is one for all linears: a function of the rows that are the sums of all shares,
    such as their Gram. While a batch is on its way there are only the rows, and only those of the
    device's own documents.

    Attributes:
        joint: The statistic's name.
    """

    joint: str

    def shapes(self) -> PyTree[jax.ShapeDtypeStruct]:
        """The statistic. Every array has rows, which the mesh shards."""
        ...

    def row_shapes(self, documents: int, positions: int) -> PyTree[jax.ShapeDtypeStruct]:
        """The rows of a batch on one device."""
        ...

    def term(
        self, site: Site, a: Array, g: Array, operands: Mapping[str, Any], context: Context
    ) -> PyTree[Array]:
        """A linear's share of the rows; arguments as in `Fold.term`."""
        ...

    def finish_rows(self, rows: PyTree[Array]) -> PyTree[Array]:
        """What this device's documents add to the statistic."""
        ...
