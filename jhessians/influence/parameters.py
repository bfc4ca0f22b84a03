"""Where a Flax module keeps the weights of the modules that a Hessian has factors of."""

import itertools
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jhessians.capture.linears import modules, weights
from jhessians.errors import CheckpointError
from jhessians.typing import Array

Path = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A parameter, and which part of it belongs to which module.

    Attributes:
        kernel: The parameter's path, [*stack, in, out].
        bias: That of the bias that counts as one more input, [*stack, out]; None if none does.
        names: Modules and their indices in the stack.
    """

    kernel: Path
    bias: Path | None
    names: tuple[tuple[str, tuple[int, ...]], ...]

    def changed(
        self, arrays: Mapping[Path, Array], change: Callable[[str, Array], Array]
    ) -> dict[Path, Array]:
        """Kernel and bias after `change` of each module's gradient [out, in].

        Args:
            arrays: All parameters' gradients, by path.
            change: Takes a module's name and gradient.

        Returns:
            Path → array, of the same shape and number format.
        """
        changed = {name: change(name, x) for name, x in self.matrices(arrays).items()}
        return self.arrays(changed, arrays)

    def matrices(self, arrays: Mapping[Path, Array]) -> dict[str, Array]:
        """The modules' matrices that some parameters' arrays hold.

        Args:
            arrays: By path, of the parameters' shapes, perhaps with further axes in front.

        Returns:
            Module → [..., out, in], the bias the last input.
        """
        kernel, found = jnp.asarray(arrays[self.kernel]), {}
        for name, index in self.names:
            matrix = kernel[..., *index, :, :].swapaxes(-1, -2)
            if self.bias is not None:
                bias = jnp.asarray(arrays[self.bias])[..., *index, :, None]
                matrix = jnp.concatenate([matrix, bias], -1)
            found[name] = matrix
        return found

    def arrays(self, matrices: Mapping[str, Array], like: Mapping[Path, Any]) -> dict[Path, Array]:
        """The parameters' arrays that hold some modules' matrices; zeros elsewhere.

        Args:
            matrices: Module → [..., out, in], the bias the last input.
            like: Path → what has the parameter's shape and number format, perhaps with axes in
                front.

        Returns:
            Kernel and bias, by path.
        """
        lead = jnp.shape(matrices[self.names[0][0]])[:-2]

        def zeros(path: Path) -> Array:
            shape = like[path].shape
            return jnp.zeros((*lead, *shape[len(shape) - self._axes(path) :]), like[path].dtype)

        kernel = zeros(self.kernel)
        bias = None if self.bias is None else zeros(self.bias)
        for name, index in self.names:
            matrix = jnp.asarray(matrices[name]).astype(kernel.dtype)
            inputs = kernel.shape[-2]
            kernel = kernel.at[..., *index, :, :].set(matrix[..., :inputs].swapaxes(-1, -2))
            if bias is not None:
                bias = bias.at[..., *index, :].set(matrix[..., -1])
        result = {self.kernel: kernel}
        if self.bias is not None and bias is not None:
            result[self.bias] = bias
        return result

    def _axes(self, path: Path) -> int:
        """How many axes a parameter has."""
        return len(self.names[0][1]) + (2 if path == self.kernel else 1)


def path_of(keys: Any) -> Path:
    """A leaf's path as words, the same for a State and for a pure dict of it."""
    words = []
    for key in keys:
        if isinstance(key, jax.tree_util.DictKey):
            words.append(str(key.key))
        elif isinstance(key, jax.tree_util.SequenceKey):
            words.append(str(key.idx))
    return tuple(words)


def places_of(model: nnx.Module, inputs: Mapping[str, int]) -> tuple[Place, ...]:
    """The places of all modules that have factors.

    Args:
        model: The Flax module.
        inputs: The modules' names, and how many inputs each has, the bias's included.

    Returns:
        Places, in the model's order.

    Raises:
        CheckpointError: If the model lacks a module, or keeps its weight as something other than a
            matrix or a stack of matrices.
    """
    paths = {
        id(variable): tuple(map(str, path))
        for path, variable in nnx.iter_graph(model)
        if isinstance(variable, nnx.Variable)
    }
    places: list[Place] = []
    found: set[str] = set()
    for prefix, owner in modules(model, inside_stacks=True):
        for weight in weights(owner, prefix):
            kernel = weight.kernel
            names = _names(weight.name, kernel.shape, inputs)
            if not names:
                continue
            found |= {name for name, _ in names}
            counts = inputs[names[0][0]] == kernel.shape[-2] + 1
            bias = paths[id(weight.bias)] if counts and weight.bias is not None else None
            places.append(Place(paths[id(kernel)], bias, tuple(names)))
    if missing := sorted(set(inputs) - found):
        raise CheckpointError(
            f"the model has no linear {missing[0]} that is a matrix, which the Hessian has factors "
            "of; expected the model that it was fitted for"
        )
    return tuple(places)


def _names(
    template: str, shape: tuple[int, ...], known: Collection[str]
) -> list[tuple[str, tuple[int, ...]]]:
    """The modules of a stack that have factors, with their indices."""
    axes = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    if len(shape) != len(axes) + 2:
        return []
    indices = itertools.product(*(range(length) for length in shape[: len(axes)]))
    named = [(template.format(**dict(zip(axes, index, strict=True))), index) for index in indices]
    return [(name, index) for name, index in named if name in known]
