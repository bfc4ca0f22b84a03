"""LoRA adapters as peft saves them: low-rank linears beside some of a base model's.

The tensors say which linears have an adapter, adapter_config.json at what scale. The adapter's own
linears bear torch bergson's names for them, such as
`model.model.layers.0.self_attn.q_proj.lora_A.default`, and are the only ones that are recorded.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from converters.adapter_config import MERGE, aims_at, check, rank_and_scale
from converters.hub import ADAPTER_CONFIG, Source
from converters.reader import StoredTensor, open_checkpoint, read_json
from converters.rules import IDENTITY, TRANSPOSE, Family, Home
from jhessians.errors import CheckpointError
from jhessians.models.lora import LoRA, freeze

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_ADAPTED = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True)
class Target:
    """The adapters of one linear of ours, in a stack those of all its layers.

    Attributes:
        path: Of the linear in our model.
        module: What transformers' model calls it, with `{layer}` for its number.
        rank: Of all layers.
        scale: Of all layers.
        layers: The layers that have the adapter, ascending; None outside a stack.
    """

    path: str
    module: str
    rank: int
    scale: float
    layers: tuple[int, ...] | None


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, opened: nothing but names and shapes has been read.

    Attributes:
        where: Its folder, for messages.
        settings: Its adapter_config.json.
        tensors: By name, as the file names them.
    """

    where: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def open_adapter(source: Source) -> Adapter:
    """Check an adapter's settings, download its weights if need be, and open them.

    Returns:
        Settings and tensors; a tensor is read when it is asked for.

    Raises:
        CheckpointError: If it isn't a plain LoRA adapter, or isn't whole.
    """
    path = source.folder / ADAPTER_CONFIG
    settings = read_json(path)
    check(settings, str(path))
    any(source.obtain(name) for name in WEIGHT_FILES)
    tensors = open_checkpoint(source.folder, WEIGHT_FILES).tensors
    return Adapter(str(source.folder), settings, tensors)


def attach(
    model: nnx.Module,
    adapter: Adapter,
    family: Family,
    homes: Mapping[str, Home],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, Home], dict[str, StoredTensor]]:
    """Freeze a model's linears and give some of them the adapter's, still without values.

    Args:
        model: Of shapes; changed in place.
        adapter: From `open_adapter`.
        family: The base model's.
        homes: The base model's tensors.
        shapes: Of the base model's parameters, by path.

    Returns:
        Home and stored tensor of every tensor of the adapter, by name.

    Raises:
        CheckpointError: If the adapter doesn't fit the model or its own settings, or wants
            something that one scan over layers can't have.
    """
    found = _modules(adapter, homes)
    freeze(model)
    taken, tensors = {}, {}
    for target in _targets(adapter, family, homes, found):
        leading = target.layers is not None
        shape = shapes[f"{target.path}.kernel"]
        linear: Any = model
        for step in target.path.split("."):
            linear = getattr(linear, step)
        linear.adapter = _lora(target, shape[leading:], shape[0] if leading else None)
    for name, parts in found.items():
        base = homes[f"{name}.weight"]
        width = shapes[base.parameter][len(base.index) :]
        rank = rank_and_scale(adapter.settings, name)[0]
        for part, expected in (("A", (rank, width[0])), ("B", (width[1], rank))):
            tensor, full = parts[part], f"base_model.model.{name}.lora_{part}.weight"
            if tensor.shape != expected or not _is_floating(tensor.dtype):
                raise CheckpointError(
                    f"{full} of {adapter.where} is {list(tensor.shape)} of {tensor.dtype}; "
                    f"expected {list(expected)} of a floating-point type; check that adapter and "
                    "base model belong together"
                )
            own = f"{base.parameter.removesuffix('kernel')}adapter.lora_{part}.kernel"
            taken[full] = Home(own, base.index, expected, TRANSPOSE)
            tensors[full] = tensor
    return taken, tensors


def refuse(model: nnx.Module, what: str) -> None:
    """For what can't be done to a model with an adapter.

    Raises:
        CheckpointError: If `model` has one.
    """
    if any(isinstance(module, LoRA) for _, module in nnx.iter_modules(model)):
        raise CheckpointError(f"the model carries a LoRA adapter, {what}; {MERGE}")


def _modules(adapter: Adapter, homes: Mapping[str, Home]) -> dict[str, dict[str, StoredTensor]]:
    """Every adapted module's A and B."""
    found: dict[str, dict[str, StoredTensor]] = {}
    others, outside = [], []
    for name, tensor in adapter.tensors.items():
        match = _ADAPTED.fullmatch(name)
        if match is None:
            others.append(name)
        elif not _is_linear(homes.get(f"{match['module']}.weight")):
            outside.append(match["module"])
        else:
            found.setdefault(match["module"], {})[match["part"]] = tensor
    if others:
        raise CheckpointError(
            f"{adapter.where} holds {_some(others)}; expected only lora_A and lora_B of linears "
            f"(embeddings, heads and whole modules aren't adapted here); {MERGE}"
        )
    if outside:
        raise CheckpointError(
            f"{adapter.where} adapts {_some(outside)}, no linear inside the base model; expected "
            f"linears of its layers, such as {_example(homes)}; {MERGE}"
        )
    missing = [f"{name}.lora_{p}" for name in found for p in "AB" if p not in found[name]]
    linears = (_module(name) for name, home in homes.items() if _is_linear(home))
    wanted = aims_at(adapter.settings)
    missing += [name for name in linears if name not in found and wanted(name)]
    if missing or not found:
        raise CheckpointError(
            f"{adapter.where} lacks {_some(missing) if missing else 'any lora_A and lora_B'}; "
            f"expected what its {ADAPTER_CONFIG} names; download or save it again"
        )
    return found


def _targets(
    adapter: Adapter, family: Family, homes: Mapping[str, Home], found: Iterable[str]
) -> Iterable[Target]:
    """The adapted modules by our linear, in the table's order."""
    modules = {rule.ours: rule.theirs.removesuffix(".weight") for rule in family.rules}
    groups: dict[str, list[str]] = {}
    for name in found:
        groups.setdefault(homes[f"{name}.weight"].parameter, []).append(name)
    for parameter in filter(groups.__contains__, modules):
        names = groups[parameter]
        (first, *rest) = (rank_and_scale(adapter.settings, name) for name in names)
        for name, other in zip(names[1:], rest, strict=True):
            if other != first:
                raise CheckpointError(
                    f"{adapter.where} gives {names[0]} rank {first[0]} and scale {first[1]:g}, but "
                    f"{name} {other[0]} and {other[1]:g}; expected the same in every layer; {MERGE}"
                )
        layers = sorted(layer for name in names for layer in homes[f"{name}.weight"].index)
        path = parameter.removesuffix(".kernel")
        yield Target(path, modules[parameter], *first, tuple(layers) or None)


def _lora(target: Target, kernel: tuple[int, ...], count: int | None) -> LoRA:
    """The adapter of a [in, out] `kernel` as shapes, stacked if there is a `count` of layers."""

    def create(rngs: nnx.Rngs) -> LoRA:
        return LoRA(
            kernel[0], kernel[1], target.rank, scale=target.scale, name=f"model.{target.module}",
            suffix=".default", members=target.layers, dtype=np.float32, rngs=rngs,
        )  # fmt: skip

    def stacked() -> LoRA:
        rngs = nnx.Rngs(0)
        return create(rngs) if count is None else nnx.vmap(create)(rngs.split(count))

    return nnx.eval_shape(stacked)


def _is_linear(home: Home | None) -> bool:
    """Whether a linear of the decoder, alone or one of a stack of layers, keeps its weight so."""
    return (
        home is not None
        and home.parameter.endswith(".kernel")
        and len(home.index) < 2
        and len(home.shape) == 2  # one that holds all experts is none
        and home.transform in (IDENTITY, TRANSPOSE)
    )


def _is_floating(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _example(homes: Mapping[str, Home]) -> str:
    return next(_module(name) for name, home in homes.items() if _is_linear(home))


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{rest}"
