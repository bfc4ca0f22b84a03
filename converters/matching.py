"""A checkpoint's tensors beside a table's homes: each one found, and none left over."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from converters import rules
from converters.reader import Checkpoint, StoredTensor
from converters.rules import Family, Home
from jhessians.errors import CheckpointError

MANY = 1000


def check_count(
    family: Family, shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint
) -> None:
    """Refuse a config that makes far more tensors than there are, before each is looked for.

    Raises:
        CheckpointError: If the number of layers, or of experts, can't be right.
    """
    wanted, there = rules.count(family, shapes), len(checkpoint.tensors)
    if wanted > 2 * there + MANY:
        raise CheckpointError(
            f"{checkpoint.folder} doesn't fit its config.json ({family.model_type}), whose layers "
            f"have {wanted} tensors, while the files hold {there}; check the number of layers there"
        )


def match(
    family: Family, wanted: Mapping[str, Home], checkpoint: Checkpoint
) -> dict[str, StoredTensor]:
    """The checkpoint's tensor for every home; nothing but names and shapes is read.

    Returns:
        Tensors under the homes' names, in the homes' order.

    Raises:
        CheckpointError: If tensors are missing, left over, there twice or of another shape.
    """
    found: dict[str, StoredTensor] = {}
    unexpected, twice = [], []
    tied = _tied_names(family, wanted)
    for stored_name, name in _full_names(family, checkpoint).items():
        tensor = checkpoint.tensors[stored_name]
        if name in found:
            twice.append(stored_name)
        elif name in wanted:
            found[name] = tensor
        elif name not in tied and not any(re.fullmatch(p, name) for p in family.ignored):
            unexpected.append(stored_name)
    missing = [name for name in wanted if name not in found]
    misshapen = [
        f"{name} is {_dimensions(tensor.shape)} where config.json makes it "
        f"{_dimensions(wanted[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != wanted[name].shape
    ]
    integers = [
        f"{name} is stored as {tensor.dtype}"
        for name, tensor in found.items()
        if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != "bfloat16"
    ]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "there under two names": twice,
        "misshapen": misshapen,
        "not a plain floating-point tensor": integers,
    }
    if problems := [_count(kind, names) for kind, names in kinds.items() if names]:
        raise CheckpointError(
            f"{checkpoint.folder} doesn't fit its config.json ({family.model_type}): "
            f"{'; '.join(problems)}; check that the folder is complete and of one model"
        )
    return {name: found[name] for name in wanted}


def check_tied(family: Family, wanted: Mapping[str, Home], checkpoint: Checkpoint) -> None:
    """Make sure that tensors which a tied model stores twice are the same.

    Raises:
        CheckpointError: If one differs from the parameter that it is tied to.
    """
    tied = _tied_names(family, wanted)
    stored = {
        full: checkpoint.tensors[name] for name, full in _full_names(family, checkpoint).items()
    }
    for name, original in tied.items():
        if name not in stored:
            continue
        copy, first = stored[name], stored[original]
        if copy.shape != first.shape or not np.array_equal(copy.read(), first.read()):
            raise CheckpointError(
                f"{name} of {checkpoint.folder} differs from {original}, to which config.json "
                "ties it; set tie_word_embeddings to false there, or remove the tensor"
            )


def _tied_names(family: Family, wanted: Mapping[str, Home]) -> dict[str, str]:
    """Names of tensors that may repeat another one, and of that one."""
    names = {home.parameter: name for name, home in wanted.items() if not home.index}
    return {
        rule.theirs: names[rule.tied_to]
        for rule in family.rules
        if rule.tied_to in names and rule.ours not in names
    }


def _full_names(family: Family, checkpoint: Checkpoint) -> dict[str, str]:
    """A checkpoint's own names → the table's: renamed, and with the base model's prefix."""
    prefix = f"{family.base_prefix}."
    outside = {rule.theirs for rule in family.rules if not rule.theirs.startswith(prefix)}
    names = {}
    for name in checkpoint.tensors:
        full = name
        for pattern, replacement in family.renamed:
            full = re.sub(pattern, replacement, full)
        names[name] = full if full.startswith(prefix) or full in outside else prefix + full
    return names


def _dimensions(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _count(kind: str, names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{kind}: {', '.join(names[:shown])}{rest}"
