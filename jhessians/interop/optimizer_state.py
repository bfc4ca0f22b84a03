"""Second moments of a trained optimizer as normalizers, from torch's `optimizer.pt` or from Orbax.

torch numbers the parameters in an optimizer's state. The parameter groups tell which number means
which parameter: a single group lists the model's `named_parameters` in order; transformers' Trainer
has two groups, first the matrices (with weight decay) and then the vectors (without), each in that
order. Some files record the names as well, which are then used. Shapes are always checked.

A second moment is stored as its parameter is: [out, in] for a Linear, [in, out] for transformers'
Conv1D, whose factored moments are exchanged too. Which of them a module is must be known; the shape
can't tell, because it is the same for both if the matrix is square.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from jhessians.errors import CheckpointError, shown
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer, Normalizer
from jhessians.interop.moments import checked_moment
from jhessians.interop.optax_state import is_orbax, read_optax_state
from jhessians.interop.torchfile import LazyTensor, open_torch_file

OPTIMIZER_FILE = "optimizer.pt"

# bitsandbytes keeps its state under this key, as codes of 8 bits or as plain numbers.
_QUANTISED = "__bnb_optimizer_quant_state__"
# Prefixes of a parameter's name from wrappers: data parallelism, torch.compile, adapters.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a torch model.

    Attributes:
        name: Its name in `named_parameters`, such as `transformer.h.0.attn.c_attn.weight`.
        shape: The shape that torch stores.
        module: If it is the weight or the bias of a linear that needs a normalizer, the module's
            name relative to the base model, such as `h.0.attn.c_attn`; None otherwise.
        transposed: Whether it is stored [in, out], as transformers' Conv1D keeps its weight.
    """

    name: str
    shape: tuple[int, ...]
    module: str | None = None
    transposed: bool = False


def load_normalizers(
    path: str | Path,
    *,
    model: nnx.Module,
    parameters: Sequence[Parameter],
    include_bias: bool = False,
) -> dict[str, Normalizer]:
    """Normalizers from an optimizer's state, of torch or of optax.

    Args:
        path: torch's file or the folder that holds it, or the folder of an Orbax checkpoint.
        model: Our model, for optax; its shapes are enough.
        parameters: The torch model's, for torch; see `converters.parameter_order`.
        include_bias: Whether to read the biases' second moments, too.

    Returns:
        Module's name → normalizer.

    Raises:
        CheckpointError: If it can't be read as the state of such a model's optimizer.
        NumericsError: If a second moment isn't finite, or is negative.
    """
    if is_orbax(path):
        return read_optax_state(path, model, include_bias=include_bias)
    return read_torch_optimizer(path, parameters, include_bias=include_bias)


def read_torch_optimizer(
    path: str | Path, parameters: Sequence[Parameter], *, include_bias: bool = False
) -> dict[str, Normalizer]:
    """Normalizers from the state_dict of a torch optimizer of Adam's or Adafactor's kind.

    Args:
        path: The file, or the folder of a Trainer's checkpoint with its `optimizer.pt`.
        parameters: All that the model has, in the order of `named_parameters`.
        include_bias: Whether to read the biases' second moments, too.

    Returns:
        Module → normalizer, for every parameter with a `module`, in float32 or wider.

    Raises:
        CheckpointError: If the file can't be read, belongs to another model or optimizer, or lacks
            a second moment.
        NumericsError: If a second moment isn't finite, or is negative.
    """
    file = Path(path)
    file = file / OPTIMIZER_FILE if file.is_dir() else file
    if not file.exists():
        raise CheckpointError(f"{file} does not exist; give an optimizer's state")
    content = open_torch_file(file)
    states, groups = _parts(file, content)
    entries = _by_name(file, states, groups, parameters)
    for parameter in parameters:
        if parameter.name in entries:
            _check_shapes(file, parameter, entries[parameter.name])
    biases = {p.module: p for p in parameters if p.module and len(p.shape) == 1}
    normalizers: dict[str, Normalizer] = {}
    for weight in parameters:
        if weight.module is None or len(weight.shape) != 2:
            continue
        bias = None
        if include_bias and weight.module in biases:
            bias = _unfactored(file, biases[weight.module], entries)
        normalizers[weight.module] = _normalizer(file, weight, entries, bias)
    return normalizers


def _parts(file: Path, content: Any) -> tuple[Mapping[Any, Any], list[Mapping[str, Any]]]:
    states = content.get("state") if isinstance(content, dict) else None
    groups = content.get("param_groups") if isinstance(content, dict) else None
    fine = isinstance(states, dict) and all(isinstance(s, dict) for s in states.values())
    fine &= isinstance(groups, list) and all(map(_is_group, groups))
    if not fine or not states:
        what = "an empty state" if fine else "no state and param_groups of the usual form"
        raise CheckpointError(
            f"{file} has {what}; expected what a torch optimizer's state_dict() gives after a step"
        )
    assert isinstance(states, dict) and isinstance(groups, list)
    return states, groups


def _is_group(group: Any) -> bool:
    """Whether it lists the numbers (or names) of parameters, and perhaps their names."""
    numbers = group.get("params") if isinstance(group, dict) else None
    names = group.get("param_names") if isinstance(group, dict) else None
    return (
        isinstance(numbers, list)
        and all(isinstance(each, int | str) for each in numbers)
        and (names is None or isinstance(names, list | tuple))
        and all(isinstance(each, str) for each in names or ())
    )


def _by_name(
    file: Path,
    states: Mapping[Any, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    parameters: Sequence[Parameter],
) -> dict[str, Mapping[str, Any]]:
    """Each parameter's state, by the parameter's name."""
    known = {parameter.name for parameter in parameters}
    recorded = {index: state["param_name"] for index, state in states.items()
                if "param_name" in state}  # fmt: skip
    if len(recorded) < len(states):
        recorded = _names_by_index(file, groups, parameters) | recorded
    entries: dict[str, Mapping[str, Any]] = {}
    for index, state in states.items():
        name = recorded.get(index, recorded.get(_number(index)))
        plain = _unwrapped(name, known)
        if plain is None:  # not among ours, such as an embedding of another name: not needed
            continue
        if plain in entries:
            raise CheckpointError(f"{file} has the state of {plain} twice; expected it once")
        entries[plain] = state
    return entries


def _number(index: Any) -> Any:
    return int(index) if isinstance(index, str) and index.isdecimal() else index


def _unwrapped(name: Any, known: set[str]) -> str | None:
    """A parameter's name without the prefixes of wrappers; None if the model has no such name."""
    if not isinstance(name, str):
        return None
    while name not in known:
        prefix = next((p for p in _WRAPPERS if name.startswith(p)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return name


def _names_by_index(
    file: Path, groups: Sequence[Mapping[str, Any]], parameters: Sequence[Parameter]
) -> dict[Any, Any]:
    """The parameter's name for each of torch's numbers."""
    indices = [index for group in groups for index in group["params"]]
    if len(set(indices)) < len(indices):
        raise CheckpointError(f"{file} has a parameter twice in its param_groups; expected it once")
    given = [name for group in groups for name in group.get("param_names") or ()]
    if len(given) == len(indices):
        return dict(zip(indices, given, strict=True))
    sizes = [len(group["params"]) for group in groups]
    for order in _orders(parameters):
        lengths = [len(part) for part in order]
        if sizes == lengths or [s for s in sizes if s] == [n for n in lengths if n]:
            names = [parameter.name for part in order for parameter in part]
            return dict(zip(indices, names, strict=True))
    raise CheckpointError(
        f"{file} has param_groups of {', '.join(map(str, sizes))} parameters, while the model has "
        f"{len(parameters)}; expected all in one group or as transformers' Trainer splits them: "
        "give the optimizer of this very model, or save it with its parameters' names"
    )


def _orders(parameters: Sequence[Parameter]) -> list[list[list[Parameter]]]:
    """The ways in which parameters may be divided among groups."""
    matrices = [p for p in parameters if len(p.shape) >= 2]
    vectors = [p for p in parameters if len(p.shape) < 2]
    others = [p for p in parameters if not p.name.endswith(".bias")]
    biases = [p for p in parameters if p.name.endswith(".bias")]
    # The Trainer divides in the last way if it doesn't know the class of a model's norms.
    return [[list(parameters)], [matrices, vectors], [others, biases]]


def _check_shapes(file: Path, parameter: Parameter, state: Mapping[str, Any]) -> None:
    """Check a state's shapes, which mostly differ if a number was taken for another parameter's."""
    shape = parameter.shape
    expected = {
        "exp_avg_sq": shape,
        "exp_avg_sq_row": shape[:-1],
        "exp_avg_sq_col": (*shape[:-2], *shape[-1:]),
    }
    for key, wanted in expected.items():
        moment = state.get(key)
        if isinstance(moment, LazyTensor) and moment.shape != wanted:
            raise CheckpointError(
                f"{file}: {key} of {parameter.name} has shape {moment.shape}; expected {wanted}: "
                "give the optimizer of this very model"
            )


def _normalizer(
    file: Path,
    weight: Parameter,
    entries: Mapping[str, Mapping[str, Any]],
    bias: Float[np.ndarray, " o"] | None,
) -> Normalizer:
    state = entries.get(weight.name, {})
    if "exp_avg_sq_row" not in state:
        moment = _unfactored(file, weight, entries)
        oriented = np.ascontiguousarray(moment.T) if weight.transposed else moment
        return AdamNormalizer(oriented, bias)
    row = _read(file, weight, state, "exp_avg_sq_row")
    col = _read(file, weight, state, "exp_avg_sq_col")
    return AdafactorNormalizer(*((col, row) if weight.transposed else (row, col)), bias)


def _unfactored(
    file: Path, parameter: Parameter, entries: Mapping[str, Mapping[str, Any]]
) -> Float[np.ndarray, "..."]:
    state = entries.get(parameter.name)
    if state is None:
        raise CheckpointError(
            f"{file} has no second moment of {parameter.name}; expected one of every linear: was "
            "it frozen? leave its module out (`filter_modules`)"
        )
    quantised = state.get(_QUANTISED)
    if not isinstance(quantised, dict):
        return _read(file, parameter, state, "exp_avg_sq")
    moment = quantised.get("state2")
    if isinstance(moment, LazyTensor) and moment.dtype == np.uint8:
        raise CheckpointError(
            f"{file} is the state of an 8-bit optimizer (bitsandbytes), whose second moments are "
            "codes; give one of 32 bits, or estimate them from the data (`normalizer` adam)"
        )
    if isinstance(moment, LazyTensor) and moment.shape != parameter.shape:
        raise CheckpointError(
            f"{file}: state2 of {parameter.name} has shape {moment.shape}; expected "
            f"{parameter.shape}: give the optimizer of this very model"
        )
    return _read(file, parameter, quantised, "state2")


def _read(
    file: Path, parameter: Parameter, state: Mapping[str, Any], key: str
) -> Float[np.ndarray, "..."]:
    moment = state.get(key)
    if not isinstance(moment, LazyTensor) or moment.dtype.kind not in "fV":  # V: of ml_dtypes
        known = shown(", ".join(map(str, state))) or "nothing"
        raise CheckpointError(
            f"{file} has no {key} of {parameter.name} as floating-point numbers, but {known}; "
            "expected the state of an "
            "optimizer of Adam's or of transformers' Adafactor's kind"
        )
    return checked_moment(moment.read(), f"{key} of {parameter.name} in {file}")
