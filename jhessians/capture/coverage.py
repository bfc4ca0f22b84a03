"""Sites together with what they leave out: each parameter is recorded, or has a reason why not."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx

from jhessians.capture.linears import Tapped, modules, weights
from jhessians.capture.site import Site


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model, those of all layers of a stack together.

    Attributes:
        path: Where it is in the model.
        shape: As it is stored.
        site: The name of the linear that it belongs to, None if it belongs to none.
        is_bias: Whether it is that linear's bias.
        reason: Why it isn't recorded, where that doesn't depend on the selection of sites.
    """

    path: str
    shape: tuple[int, ...]
    site: str | None = None
    is_bias: bool = False
    reason: str = ""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PassedOver:
    """A parameter that no fold sees, or of which it sees some layers only.

    Attributes:
        path: Where it is in the model; `*` stands for several numbers.
        shape: As it is stored.
        reason: Why it is passed over.
        count: How many parameters of this path and shape there are.
    """

    path: str
    shape: tuple[int, ...]
    reason: str
    count: int = 1


@dataclass(frozen=True)
class Coverage:
    """How much of a model the recorded linears hold.

    Attributes:
        recorded: How many numbers among the parameters are recorded.
        total: How many there are.
        passed_over: The parameters that are not, those of alike layers as one entry.
    """

    recorded: int
    total: int
    passed_over: tuple[PassedOver, ...]

    @property
    def share(self) -> float:
        """`recorded` as a share of `total`, from 0 to 1."""
        return self.recorded / self.total if self.total else 0.0

    def lines(self) -> list[str]:
        """The share, and then one line for each reason with all parameters that it holds for."""
        lines = [f"{100 * self.share:.1f} % of {self.total:,} parameters are recorded"]
        by_reason: dict[str, list[str]] = {}
        for each in self.passed_over:
            times = f"{each.count} x " if each.count > 1 else ""
            where = f"{each.path} ({times}{list(each.shape)})"
            by_reason.setdefault(each.reason, []).append(where)
        return lines + [f"passed over, {why}: {', '.join(each)}" for why, each in by_reason.items()]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Sites(dict[str, Site]):
    """The linears to record, by name, and the account of all of the model's parameters.

    Args:
        sites: The linears.
        parameters: All parameters of the model.
    """

    def __init__(self, sites: Mapping[str, Site], parameters: Iterable[Parameter] = ()):
        super().__init__(sites)
        self.parameters = tuple(parameters)

    @property
    def coverage(self) -> Coverage:
        """The share of the parameters that these sites record, and what they pass over."""
        recorded, left = 0, list[PassedOver]()
        for parameter in self.parameters:
            share, reason = self._recorded(parameter)
            recorded += round(share * parameter.size)
            if share < 1:
                left.append(PassedOver(parameter.path, parameter.shape, reason))
        return Coverage(recorded, sum(each.size for each in self.parameters), _grouped(left))

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        """The parameters that no fold sees, with the reasons."""
        return self.coverage.passed_over

    def _recorded(self, parameter: Parameter) -> tuple[float, str]:
        """Which share of a parameter is recorded, and why not the rest."""
        if parameter.reason:
            return 0.0, parameter.reason
        site = self.get(parameter.site or "")
        if site is None:
            return 0.0, "left out by the selection"
        if parameter.is_bias and not site.ones:
            return 0.0, "biases, which count only where sites include them"
        if site.members is None or len(site.members) == site.stack_size:
            return 1.0, ""
        reason = f"other than {len(site.members)} selected of {site.stack_size} linears"
        return len(site.members) / site.stack_size, reason


def parameters_of(
    model: nnx.Module, sites: Mapping[str, Site], reasons: Mapping[str, str]
) -> list[Parameter]:
    """Every parameter of `model` once, with the site that records it or the reason why none does.

    Args:
        model: Arrays or shapes.
        sites: All linears that can be recorded.
        reasons: Why other linears can't be, by the name that their site would have.

    Returns:
        The parameters in the model's order. One that several modules hold belongs to a linear if
        any of them is a linear.
    """
    found: dict[int, Parameter] = {}
    names: dict[int, str] = {}
    for path, owner in modules(model, inside_stacks=True):
        linear: dict[int, tuple[str, bool]] = {}
        for weight in weights(owner, path):
            name = names.setdefault(id(weight.kernel), weight.name)
            linear[id(weight.kernel)] = (name, False)
            if weight.bias is not None:
                linear[id(weight.bias)] = (name, True)
        for where, variable in held_parameters(owner, path):
            site, is_bias = linear.get(id(variable), (None, False))
            if site is None:
                reason = _reason(owner)
            else:
                reason = "" if site in sites else reasons.get(site, _never_called(owner))
            parameter = Parameter(where, tuple(variable.shape), site, is_bias, reason)
            # A parameter that several modules hold is a linear's, if one of them is a linear.
            known = found.setdefault(id(variable), parameter)
            if known.site is None and site is not None:
                found[id(variable)] = parameter
    return list(found.values())


def held_parameters(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The parameters that `node` holds itself, not those of modules inside it.

    Args:
        node: A module, or a dict, list or tuple that a module holds.
        prefix: The path of `node`.

    Yields:
        Path and `nnx.Param` of each.
    """
    held = vars(node) if isinstance(node, nnx.Module) else node
    for key, value in held.items() if isinstance(held, dict) else enumerate(held):
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, nnx.Param):
            yield path, value
        elif isinstance(value, dict | list | tuple) and not str(key).startswith("_pytree__"):
            yield from held_parameters(value, path)


def _reason(owner: nnx.Module) -> str:
    """Why parameters of a module that is no linear are passed over."""
    if isinstance(owner, nnx.bridge.ToNNX):
        return "of a flax.linen module (nnx.bridge.ToNNX), whose products can't be recorded"
    if isinstance(owner, Tapped) and owner.frozen:
        return "of frozen linears"
    if isinstance(owner, nnx.LoRA):
        return f"of {type(owner).__name__}, which multiplies in a way of its own"
    return f"of {type(owner).__name__}, which is not a linear"


def _never_called(owner: nnx.Module) -> str:
    """Why a linear of which no product was seen is passed over."""
    flax = owner.__class__.__call__ in (
        nnx.Linear.__call__, nnx.LinearGeneral.__call__, nnx.Einsum.__call__, nnx.LoRA.__call__,
        nnx.LoRALinear.__call__,
    )  # fmt: skip
    if isinstance(owner, Tapped) or flax:
        return "of linears that the loss never calls"
    return f"of {type(owner).__name__}, which the loss never calls or which multiplies by itself"


def _grouped(passed_over: Iterable[PassedOver]) -> tuple[PassedOver, ...]:
    """Entries that differ by numbers in their paths only, as one."""
    groups: dict[PassedOver, list[PassedOver]] = {}
    for each in passed_over:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", each.path)
        groups.setdefault(replace(each, path=pattern), []).append(each)
    return tuple(
        each[0] if len(each) == 1 else replace(pattern, count=len(each))
        for pattern, each in groups.items()
    )
