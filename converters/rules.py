"""The engine: a family is a table of rules, and everything else follows from the table.

A rule says which tensor of a checkpoint holds which of our parameters, and how the values are laid
out there. `{layer}` in a tensor's name (or any other word in braces) stands for an index along a
leading axis of our parameter: one stacked array of ours is many tensors of theirs.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jhessians.models.config import DecoderConfig

Values = Shaped[np.ndarray, "..."]
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Transform:
    """How a tensor of theirs becomes one of ours; reversible, bit for bit.

    Attributes:
        name: For readers.
        to_ours: From theirs.
        to_theirs: And back.
        slices: Which slices of theirs `to_ours` makes given slices of ours from, one per axis;
            None if it needs the whole tensor.
    """

    name: str
    to_ours: Callable[[Values], Values]
    to_theirs: Callable[[Values], Values]
    slices: Callable[[Slices], Slices] | None = None


IDENTITY = Transform("identity", lambda x: x, lambda x: x, lambda i: i)
TRANSPOSE = Transform(
    "transpose",
    lambda x: x.swapaxes(-1, -2),
    lambda x: x.swapaxes(-1, -2),
    lambda i: (*i[:-2], i[-1], i[-2]),
)
"""[out, in], as torch keeps a linear's weight, ↔ [in, out]."""


@dataclass(frozen=True)
class Rule:
    """Where a parameter of ours lies in a checkpoint.

    Attributes:
        ours: Its path in our module. A rule for a parameter that the module doesn't have (a bias,
            where the config has none) rests.
        theirs: The tensor's full name; words in braces index the parameter's leading axes.
        transform: Between the tensor and the parameter's entry.
        tied_to: Path of the parameter that a resting rule's tensor must repeat, if it is there.
        part: (k, n) if the tensor is the k-th of n that lie side by side along the last axis of the
            parameter's entry.
    """

    ours: str
    theirs: str
    transform: Transform = IDENTITY
    tied_to: str | None = None
    part: tuple[int, int] = (0, 1)


def linear(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Kernel and bias of a torch Linear."""
    return (
        Rule(f"{ours}.kernel", f"{theirs}.weight", TRANSPOSE),
        Rule(f"{ours}.bias", f"{theirs}.bias"),
    )


def conv1d(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Kernel and bias of transformers' Conv1D, which keeps its weight [in, out] as we do."""
    return Rule(f"{ours}.kernel", f"{theirs}.weight"), Rule(f"{ours}.bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Scale and, where there is one, bias of a norm."""
    return Rule(f"{ours}.scale", f"{theirs}.weight"), Rule(f"{ours}.bias", f"{theirs}.bias")


@dataclass(frozen=True)
class Family:
    """All that tells one kind of checkpoint from another, as data.

    Attributes:
        model_type: As config.json names it.
        architecture: transformers' class with the language model's head.
        base_prefix: What that class calls the model without the head; checkpoints of the bare
            model lack it in their tensors' names.
        config: Reads transformers' config; refuses by CheckpointError what we don't implement.
        rules: The table.
        renamed: Other names that tensors have in some checkpoints: pattern and replacement.
        ignored: Patterns of full names of tensors that carry no weights.
        modules: Names of modules, relative to the base model, where tensors' names don't tell them:
            our path and theirs.
        reads: Settings of `converters.settings.NEUTRAL` that `config` looks at itself.
        variant: Turns the family into the one of a given config, where names of tensors depend on
            its settings.
        title: What people call its models, for the README's table.
        checked: What the tests compare beside what they compare for every family, likewise.
    """

    model_type: str
    architecture: str
    base_prefix: str
    config: Callable[[Any], DecoderConfig]
    rules: tuple[Rule, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    reads: frozenset[str] = frozenset()
    variant: Callable[["Family", Any], "Family"] | None = None
    title: str = ""
    checked: str = ""


@dataclass(frozen=True)
class Home:
    """The place in our parameters of one tensor of theirs.

    Attributes:
        parameter: Path of the parameter.
        index: Of the tensor's entry along its leading axes.
        shape: Of the tensor, as they lay it out.
        transform: From there to the entry, or to its part.
        part: As in `Rule`.
    """

    parameter: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    transform: Transform
    part: tuple[int, int] = (0, 1)

    def part_of(self, entry: Values) -> Values:
        """This tensor's columns of the whole entry."""
        k, count = self.part
        width = entry.shape[-1] // count if entry.ndim else 0
        return entry[..., k * width : (k + 1) * width] if count > 1 else entry


def homes(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Home]:
    """Every tensor that a checkpoint of this module has, by name.

    Args:
        family: The table.
        shapes: Of the module's parameters, by path.

    Returns:
        Tensor's name → the parameter that holds it, and where in it.

    Raises:
        ValueError: If the table doesn't name each parameter exactly once.
    """
    found: dict[str, Home] = {}
    parts: dict[str, set[int]] = {}
    missing: dict[str, int] = {}
    for rule in family.rules:
        if rule.ours not in shapes:
            continue
        number, count = rule.part
        if number in parts.setdefault(rule.ours, set()):
            raise ValueError(f"{family.model_type}'s table names {rule.ours} twice")
        parts[rule.ours].add(number)
        missing[rule.ours] = count - len(parts[rule.ours])
        axes = _placeholders(rule.theirs)
        leading, entry = shapes[rule.ours][: len(axes)], shapes[rule.ours][len(axes) :]
        # A transform tells the shape that it gives from an array without memory.
        if entry and entry[-1] % count:
            raise ValueError(f"{rule.ours} of shape {entry} can't be divided into {count} parts")
        entry = (*entry[:-1], entry[-1] // count) if count > 1 else entry
        shape = rule.transform.to_theirs(np.broadcast_to(np.float32(0), entry)).shape
        for index in np.ndindex(leading):
            name = rule.theirs.format(**dict(zip(axes, index, strict=True)))
            if name in found:
                raise ValueError(f"{family.model_type}'s table gives {name} to two parameters")
            found[name] = Home(rule.ours, index, shape, rule.transform, rule.part)
    if forgotten := sorted(path for path in shapes if missing.get(path, 1)):
        raise ValueError(f"{family.model_type}'s table has no rule for {', '.join(forgotten)}")
    return found


def count(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many tensors `homes` would find, told without naming them."""
    leading = (
        shapes[rule.ours][: len(_placeholders(rule.theirs))]
        for rule in family.rules
        if rule.ours in shapes
    )
    return sum(map(math.prod, leading))


def module_names(family: Family) -> dict[str, str]:
    """Hugging Face's name, relative to the base model, of every module with a kernel.

    Returns:
        Our path → theirs, with `{layer}` in it: the keys that torch bergson reads.
    """
    told = {
        rule.ours.removesuffix(".kernel"): rule.theirs.removesuffix(".weight").removeprefix(
            f"{family.base_prefix}."
        )
        for rule in family.rules
        if rule.ours.endswith(".kernel")
    }
    return told | dict(family.modules)


def _placeholders(template: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", template)
