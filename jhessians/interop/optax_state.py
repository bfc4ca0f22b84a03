"""Second moments from an optax state in an Orbax checkpoint.

The state of an optax chain is nested named tuples, which Orbax restores as lists and dicts without
their types. So a state is recognised by its fields: `mu` and `nu` belong to Adam (also AdamW and
others like them), `v_row`, `v_col` and `v` to Adafactor. Each field holds a tree with the structure
of the model's parameters: kernels are [in, out], stacked where the model stacks its layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from jhessians.capture.linears import tapped_modules
from jhessians.errors import CheckpointError
from jhessians.files import require_ordinary_files
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer, Normalizer
from jhessians.interop.moments import checked_moment

_METADATA = "_METADATA"  # the file that marks a folder of Orbax
_ADAM = ("mu", "nu")
_ADAFACTOR = ("v_row", "v_col", "v")
_MOMENTS = ("nu", *_ADAFACTOR)


def is_orbax(path: str | Path) -> bool:
    """Whether a folder is an Orbax checkpoint, or holds one."""
    return _orbax_folder(Path(path)) is not None


def read_optax_state(
    path: str | Path, model: nnx.Module, *, include_bias: bool = False
) -> dict[str, Normalizer]:
    """Normalizers from a checkpoint that holds an optimizer's state, perhaps among other things.

    Only second moments are read, not the parameters, nor the first moments.

    Args:
        path: Folder of an Orbax checkpoint of a pytree, or one that holds one such item.
        model: The model that was trained, made with our `Linear`; its shapes are enough.
        include_bias: Whether to read the biases' second moments, too.

    Returns:
        Module's full name → normalizer, of every linear of the model.

    Raises:
        CheckpointError: If it can't be read, or a linear has no second moment, more than one, or
            one of another shape.
        NumericsError: If a second moment isn't finite, or is negative.
    """
    import orbax.checkpoint as ocp

    folder = _orbax_folder(Path(path))
    if folder is None:
        raise CheckpointError(
            f"{path} isn't an Orbax checkpoint of one tree; give the folder that holds {_METADATA}"
        )
    reader = ocp.PyTreeCheckpointer()
    try:
        require_ordinary_files(folder)
        tree = reader.metadata(folder).item_metadata.tree
        wanted = jax.tree_util.tree_map_with_path(
            lambda keys, leaf: leaf if _names(keys) & set(_MOMENTS) else ocp.PLACEHOLDER, tree
        )
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        state = reader.restore(folder, ocp.args.PyTreeRestore(wanted, arguments))
    except Exception as error:  # Orbax and TensorStore raise whatever a damaged file leads to
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} can't be read as an Orbax checkpoint: {reason}") from None
    return normalizers_from_optax(state, model, include_bias=include_bias, where=str(folder))


def normalizers_from_optax(
    state: Any, model: nnx.Module, *, include_bias: bool = False, where: str = "the optimizer"
) -> dict[str, Normalizer]:
    """Normalizers from an optax state in memory, or as Orbax restores it.

    Args:
        state: Any nest of tuples, lists and dicts that holds, somewhere, Adam's or Adafactor's.
        model: The model that was trained, made with our `Linear`; its shapes are enough.
        include_bias: Whether to read the biases' second moments, too.
        where: Names the state in errors.

    Returns:
        Module's full name → normalizer, of every linear of the model. A weight too small for
        Adafactor to factor has one second moment for each entry, and so an `AdamNormalizer`.

    Raises:
        CheckpointError: If there is no second moment of a linear, or more than one, or it has
            another shape.
        NumericsError: If a second moment isn't finite, or is negative.
    """
    found = list(_second_moments(state))
    if not found:
        raise CheckpointError(
            f"{where} holds no state of optax's Adam (mu, nu) or Adafactor (v_row, v_col, v); "
            "expected that of the optimizer that trained the model"
        )
    normalizers: dict[str, Normalizer] = {}
    for linear in linears(model):
        weight = _moments_of(found, linear, "kernel", where)
        bias = None
        if include_bias and linear.bias_shape is not None:
            (bias,) = _moments_of(found, linear, "bias", where)
        for index, name in zip(np.ndindex(linear.stack), linear.modules, strict=True):
            own = [x[index] for x in weight]
            normalizers[name] = _normalizer(own, None if bias is None else bias[index])
    return normalizers


class LinearPlace(NamedTuple):
    """Where the parameters of a linear are, or those of the same linear in all layers of a stack.

    Attributes:
        path: Path of the module in the model's state.
        modules: Full names of the modules; in a stack, one for each layer and expert.
        stack: Numbers of layers and of experts, the leading axes of the parameters.
        kernel_shape: Stored shape, [(layer,) (expert,) in, out].
        bias_shape: Stored shape, [(layer,) (expert,) out]; None if there is no bias.
    """

    path: tuple[str, ...]
    modules: tuple[str, ...]
    stack: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None


def linears(model: nnx.Module) -> Iterator[LinearPlace]:
    """Every linear of a model, under the names that the traversal gives them."""
    for path, module in tapped_modules(model):
        if not module.scans:
            yield _place(path, module, module.name or path + module.suffix, {})
            continue
        stack: Any = module
        prefix = f"{stack.name or path}.{{layer}}"
        for inner_path, inner in tapped_modules(stack.blocks):
            name = inner.name or f"{prefix}.{inner_path}{inner.suffix}"
            yield _place(f"{path}.blocks.{inner_path}", inner, name, {"layer": stack.count})


def _place(path: str, linear: Any, name: str, stack: dict[str, int]) -> LinearPlace:
    kernel = tuple(linear.kernel.shape)
    if len(kernel) > len(stack) + 2:
        stack = {**stack, "expert": kernel[len(stack)]}
    shape = tuple(stack.values())
    modules = tuple(
        name.format(**dict(zip(stack, index, strict=True))) for index in np.ndindex(shape)
    )
    bias = None if linear.bias is None else tuple(linear.bias.shape)
    return LinearPlace(tuple(path.split(".")), modules, shape, kernel, bias)


def _orbax_folder(path: Path) -> Path | None:
    if (path / _METADATA).is_file():
        return path.absolute()
    inside = [file.parent for file in path.glob(f"*/{_METADATA}")] if path.is_dir() else []
    return inside[0].absolute() if len(inside) == 1 else None


def _names(keys: Sequence[Any]) -> set[str]:
    return {str(getattr(key, "key", getattr(key, "name", ""))) for key in keys}


def _second_moments(node: Any) -> Iterator[tuple[Any, ...]]:
    """Search a nest for states, and give the trees of each: Adam's one, or Adafactor's three."""
    fields = getattr(node, "_asdict", lambda: node)()  # a state in memory is a named tuple
    if isinstance(fields, Mapping):
        if set(fields) >= set(_ADAM):
            yield (fields["nu"],)
            return
        if set(fields) >= set(_ADAFACTOR):
            yield tuple(fields[name] for name in _ADAFACTOR)
            return
        for child in fields.values():
            yield from _second_moments(child)
    elif isinstance(node, list | tuple):
        for child in node:
            yield from _second_moments(child)


def _moments_of(
    found: Sequence[tuple[Any, ...]], linear: LinearPlace, kind: str, where: str
) -> list[Float[np.ndarray, "..."]]:
    """A parameter's second moment, of its own shape, or the means [(layer,) out], [(layer,) in]."""
    name = ".".join((*linear.path, kind))
    shape = linear.kernel_shape if kind == "kernel" else linear.bias_shape
    assert shape is not None
    held = [[_leaf(tree, (*linear.path, kind)) for tree in trees] for trees in found]
    held = [leaves for leaves in held if all(leaf is not None for leaf in leaves)]
    if len(held) != 1:
        count = "no second moment" if not held else f"{len(held)} second moments"
        raise CheckpointError(
            f"{where} has {count} of {name}; expected one, of the optimizer that trained the model"
        )
    *factors, whole = held[0]
    if tuple(whole.shape) == shape:
        return [checked_moment(np.asarray(whole), f"the second moment of {name}")]
    # Of the two largest axes, `v_row` is the mean over the larger one and `v_col` that over the
    # other one; if they are equal, the last axis counts as the larger one.
    smaller, larger = sorted(range(len(shape)), key=lambda axis: shape[axis])[-2:]
    expected = [_without(shape, larger), _without(shape, smaller)]
    mixed = min(smaller, larger) < len(linear.stack)  # means over layers or experts
    if [tuple(x.shape) for x in factors] != expected or kind != "kernel" or mixed:
        given = ", ".join(str(tuple(x.shape)) for x in (*factors, whole))
        raise CheckpointError(
            f"{where} has second moments of {name} of shape {given}; expected {shape}"
            f"{' or its row and column means' if kind == 'kernel' else ''}"
        )
    arrays = [checked_moment(np.asarray(x), f"the second moment of {name}") for x in factors]
    # `v_row` still has the smaller axis, which are the outputs if it is the last one.
    return arrays if smaller == len(shape) - 1 else arrays[::-1]


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _leaf(tree: Any, path: Sequence[str]) -> Any:
    """The array at a path of a tree, or None; an `nnx.Variable` around it is removed."""
    for step in path:
        if not isinstance(tree, Mapping) or step not in tree:
            return None
        tree = tree[step]
    if isinstance(tree, nnx.Variable):
        tree = tree.get_value()
    if isinstance(tree, Mapping) and set(tree) == {"value"}:
        tree = tree["value"]
    return tree if hasattr(tree, "shape") else None


def _normalizer(
    weight: Sequence[Float[np.ndarray, "..."]], bias: Float[np.ndarray, " o"] | None
) -> Normalizer:
    if len(weight) == 1:
        return AdamNormalizer(np.ascontiguousarray(weight[0].T), bias)
    row, col = weight
    return AdafactorNormalizer(row, col, bias)
