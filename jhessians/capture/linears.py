"""Which modules of a model are linears, under which names, and how they come to tell a tape.

Our own linears (`Tapped`) ask their tape to multiply. Those of Flax are given, in the copy of the
model that is made for one trace, a `dot_general` or `einsum_op` that multiplies as before and then
shows the tape input and output. The caller's model is never changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jax import lax

from jhessians.capture.products import Product
from jhessians.typing import Array


class Attached(nnx.Module):
    """A module that knows the tape of the pass that is traced.

    Attributes:
        tape: Of the pass; None outside of one.
        tables: Names of parameters of which it gathers parts itself (`jhessians.capture.shards`).
    """

    tape: Any = None
    tables: ClassVar[tuple[str, ...]] = ()


class Tapped(Attached):
    """A module that a tape is attached to as a whole: a linear, or a stack of blocks.

    It asks the tape to multiply.

    Attributes:
        name: Under which name its statistics are reported; by default its path in the model.
        frozen: Whether it is passed over; modules inside it may be recorded nevertheless.
        members: Which linears of its stack are recorded; None for all.
        scans: Whether it runs blocks of its own and attaches the tape to each of them.
        suffix: What its name ends with where that is its path.
    """

    name: str | None = None
    frozen: bool = False
    members: tuple[int, ...] | None = None
    scans = False
    suffix = ""


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix that a linear multiplies its input with.

    Attributes:
        name: Of its site.
        kernel: Its parameter, in whatever shape the linear keeps it.
        bias: The parameter that is added to the product, if there is one.
    """

    name: str
    kernel: nnx.Variable[Array]
    bias: nnx.Variable[Array] | None = None


def modules(
    node: Any, prefix: str = "", *, inside_stacks: bool = False, seen: set[int] | None = None
) -> Iterator[tuple[str, nnx.Module]]:
    """`node` and all modules in it, each once, the outer ones first.

    What is inside a linear of ours that isn't frozen belongs to that linear and is left out.

    Args:
        node: A module, or a dict, list or tuple of some.
        prefix: The path of `node`.
        inside_stacks: Whether to go on inside our own linears and stacks; the layer's number in
            a path inside a stack is `{layer}`.
        seen: The identities of what was met already.

    Yields:
        Path and module of each.
    """
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, nnx.Module):
        yield prefix, node
        stack: Any = node
        if isinstance(node, Tapped) and not node.frozen:
            if not inside_stacks:
                return
            if node.scans:
                path = f"{node.name or prefix}.{{layer}}"
                yield from modules(stack.blocks, path, inside_stacks=True, seen=seen)
                return
    for key, child in children(node):
        path = f"{prefix}.{key}" if prefix else str(key)
        yield from modules(child, path, inside_stacks=inside_stacks, seen=seen)


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """What `node` holds that may be a module or contain some.

    Args:
        node: A module, dict, list or tuple; anything else holds nothing.

    Yields:
        Key and value of each.
    """
    if isinstance(node, nnx.Module):
        yield from nnx.iter_module_children(node, graph=True)
        for key, value in vars(node).items():
            if isinstance(value, dict | list | tuple) and not key.startswith("_pytree__"):
                yield key, value
    elif isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list | tuple):
        yield from enumerate(node)


def tapped_modules(model: nnx.Module, prefix: str = "") -> Iterator[tuple[str, Tapped]]:
    """Every tapped module that is not frozen and not inside another one.

    Args:
        model: Is searched.
        prefix: The path of `model`, with which the others begin.

    Yields:
        Path and module of each.
    """
    for path, module in modules(model, prefix):
        if isinstance(module, Tapped) and not module.frozen:
            yield path, module


def weights(module: nnx.Module, path: str) -> list[Weight]:
    """The matrices that `module` itself multiplies with.

    Args:
        module: Any module.
        path: Where it is in the model, which its site is named by unless it has a name.

    Returns:
        One for a linear, two for `nnx.LoRA`; none for a module that is no linear we know, is frozen
        or has no kernel.
    """
    linear: Any = module
    if isinstance(module, Tapped):
        if module.scans or module.frozen or getattr(module, "kernel", None) is None:
            return []
        return [Weight(module.name or path + module.suffix, linear.kernel, linear.bias)]
    if isinstance(module, nnx.Linear | nnx.LinearGeneral | nnx.Einsum):
        return [Weight(path or "linear", module.kernel, module.bias)]
    if type(module) in (nnx.LoRA, _RecordedLoRA):
        before = f"{path}." if path else ""
        return [
            Weight(f"{before}lora_a", linear.lora_a),
            Weight(f"{before}lora_b", linear.lora_b),
        ]
    return []


def attach(model: nnx.Module, tape: Any, prefix: str = "") -> None:
    """Let `tape` listen to `model`, a copy that was merged for this trace and dies with it.

    Linears that share one parameter share the name of the first of them: they are one site, called
    several times.

    Args:
        model: The copy. Its modules are changed in place.
        tape: What the linears ask to multiply, or show their products.
        prefix: The path of `model`.
    """
    names: dict[int, str] = {}
    for path, module in modules(model, prefix):
        shared = [
            Weight(names.setdefault(id(each.kernel), each.name), each.kernel, each.bias)
            for each in weights(module, path)
        ]
        if isinstance(module, Tapped):
            if not module.frozen:
                module.tape = tape
                module.name = shared[0].name if shared else module.name or path + module.suffix
        elif isinstance(module, Attached):
            module.tape = tape
        elif shared:
            _listen(module, tape, shared)


def _listen(module: Any, tape: Any, weights: list[Weight]) -> None:
    """Have a linear of Flax show `tape` its products."""
    if len(weights) == 2:  # it multiplies without a function that could be replaced
        object.__setattr__(module, "__class__", _RecordedLoRA)
        module.tape, module.weights = tape, tuple(weights)
        return
    (weight,) = weights
    if isinstance(module, nnx.Einsum):
        einsum = module.einsum_op

        def einsum_op(equation: str, x: Array, kernel: Array, **options: Any) -> Array:
            y = einsum(equation, x, kernel, **options)
            how = Product.of_einsum(equation, x.ndim)
            observed: Array = tape.observe(weight, how, x, kernel, y)
            return observed

        module.einsum_op = einsum_op
        return
    made = getattr(module, "dot_general_cls", None)  # which comes before `dot_general` in Flax
    multiply = made() if made is not None else module.dot_general or lax.dot_general

    def dot_general(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
        y = multiply(x, kernel, dimension_numbers, **options)
        product = Product.of_dot_general(dimension_numbers, x.ndim, kernel.ndim)
        observed: Array = tape.observe(weight, product, x, kernel, y)
        return observed

    module.dot_general = dot_general
    if made is not None:
        module.dot_general_cls = None


class _RecordedLoRA(nnx.LoRA):
    """`nnx.LoRA`, which multiplies without a `dot_general` of its own, and shows a tape how."""

    tape: Any = None
    weights: tuple[Weight, ...] = ()

    def __call__(self, x: Array, **options: Any) -> Array:
        x, *kernels = self.promote_dtype((x, self.lora_a[...], self.lora_b[...]), dtype=self.dtype)
        y = x
        for weight, kernel in zip(self.weights, kernels, strict=True):
            product = Product.of_einsum("...a,ab->...b", y.ndim)
            y = self.tape.observe(weight, product, y, kernel, y @ kernel)
        base: Any = self.base_module
        return y if base is None else y + base(x, **options)
