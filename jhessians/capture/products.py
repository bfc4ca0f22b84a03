"""Matrix products written as labelled axes: which `dot_general` or `einsum` is a linear layer.

Every axis of the input, the kernel and the output gets a letter. A linear layer contracts features
that the input and the kernel share, and keeps the input's other axes (documents, positions) as well
as the kernel's others (output features). Its arrays can then be flattened to
a: [document, position..., in], kernel [in, out] and y: [document, position..., out].
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass

from jhessians.typing import Array, Shaped


@dataclass(frozen=True)
class Product:
    """The letters of the axes of x, kernel and y in y = einsum("x,kernel->y").

    Attributes:
        x: The input's axes; the first one is the documents'.
        kernel: The kernel's axes.
        y: The output's axes.
    """

    x: str
    kernel: str
    y: str

    @classmethod
    def of_dot_general(
        cls,
        dimension_numbers: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
        x_axes: int,
        kernel_axes: int,
    ) -> "Product":
        """The product that `jax.lax.dot_general` computes with these dimension numbers.

        Args:
            dimension_numbers: Contracted axes of both operands, then batch axes of both.
            x_axes: How many axes x has.
            kernel_axes: How many axes the kernel has.

        Returns:
            The letters of all axes; those that are contracted or of a batch have the same letter in
            both operands.
        """
        (x_contracted, kernel_contracted), (x_batch, kernel_batch) = dimension_numbers
        letters = iter(string.ascii_letters)
        x = [next(letters) for _ in range(x_axes)]
        kernel = [next(letters) for _ in range(kernel_axes)]
        for i, j in [
            *zip(x_contracted, kernel_contracted, strict=True),
            *zip(x_batch, kernel_batch, strict=True),
        ]:
            kernel[j] = x[i]
        batch = [x[i] for i in x_batch]
        y = batch + [each for each in x if each not in kernel]
        y += [each for each in kernel if each not in x]
        return cls("".join(x), "".join(kernel), "".join(y))

    @classmethod
    def of_einsum(cls, equation: str, x_axes: int) -> "Product":
        """The product of an explicit `einsum` equation of two operands.

        Args:
            equation: Such as "...a,ab->...b"; an ellipsis stands for axes of x.
            x_axes: How many axes x has.

        Returns:
            The equation's letters, and free ones for the axes of an ellipsis of x.
        """
        operands, y = equation.replace(" ", "").split("->")
        x, kernel = operands.split(",")
        free = (each for each in string.ascii_letters if each not in equation)
        if "..." in x:
            several = "".join(next(free) for _ in range(x_axes - len(x.replace("...", ""))))
            x, y = x.replace("...", several), y.replace("...", several)
        return cls(x, kernel, y)

    @property
    def outputs(self) -> str:
        """The kernel's axes that are output features, in the kernel's order."""
        return "".join(each for each in self.kernel if each not in self.x)

    @property
    def inputs(self) -> str:
        """The contracted axes, in the kernel's order."""
        return "".join(each for each in self.kernel if each in self.x)

    @property
    def positions(self) -> str:
        """The input's axes that are kept, documents first."""
        return "".join(each for each in self.x if each not in self.kernel)

    def obstacle(self, x_shape: Sequence[int], kernel_shape: Sequence[int]) -> str | None:
        """Why this product is not that of a linear layer that reads documents.

        Args:
            x_shape: The shape of the input, whose first axis should be the documents'.
            kernel_shape: The shape of the kernel.

        Returns:
            Half a sentence for a message; None if it is a linear layer's.
        """
        written = f"{self.x},{self.kernel}->{self.y}"
        if "..." in self.kernel:
            return f"its kernel has an ellipsis in {written}"
        if any(len(set(axes)) < len(axes) for axes in (self.x, self.kernel, self.y)):
            return f"an axis occurs twice in one array of {written}"
        if set(self.inputs) & set(self.y):
            return f"each entry of an axis of its input has a kernel of its own ({written})"
        if set(self.y) != set(self.positions + self.outputs):
            return f"it sums over an axis that only one of input and kernel has ({written})"
        if not self.positions.startswith(self.x[:1] or "?") or self.y[:1] != self.x[:1]:
            return f"its first axis, that of the documents, is not kept in place ({written})"
        sizes = dict(zip(self.kernel, kernel_shape, strict=True))
        if any(sizes.get(each, size) != size for each, size in zip(self.x, x_shape, strict=True)):
            return f"its input is broadcast along a contracted axis ({written})"
        return None

    def flat_input(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The input with its position axes first and its features together.

        Args:
            x: An array with the axes of `self.x`.

        Returns:
            [document, position..., in]; the very same array where it has that form.
        """
        return _flattened(x, self.x, self.positions, self.inputs)

    def flat_output(self, y: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The output with its position axes first and its features together.

        Args:
            y: An array with the axes of `self.y`.

        Returns:
            [document, position..., out]; the very same array where it has that form.
        """
        return _flattened(y, self.y, self.positions, self.outputs)

    def restored_output(
        self, flat: Shaped[Array, "..."], y: Shaped[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """Undo `flat_output`.

        Args:
            flat: [document, position..., out].
            y: An array of the form that is wanted; its numbers aren't read.

        Returns:
            `flat` with the axes of `self.y`.
        """
        order = self.positions + self.outputs
        sizes = dict(zip(self.y, y.shape, strict=True))
        unflattened = flat.reshape([sizes[each] for each in order])
        return unflattened.transpose([order.index(each) for each in self.y])


def _flattened(array: Array, axes: str, rows: str, features: str) -> Array:
    """`array`, whose axes are `axes`, as [rows..., all features together]."""
    if axes == rows + features and len(features) == 1:
        return array
    moved = array.transpose([axes.index(each) for each in rows + features])
    return moved.reshape(*moved.shape[: len(rows)], -1)
