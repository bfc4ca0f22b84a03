"""The tensors of a Hugging Face checkpoint folder, by name, none of them read yet.

Names and shapes come from the files' headers; a tensor's bytes are read when its `read` is called,
and nothing keeps them afterwards. Of a safetensors file any part of a tensor can be read.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from jhessians.errors import CheckpointError, quoted, shown
from jhessians.files import open_input
from jhessians.files import read_json as read_any_json
from jhessians.interop.safetensors_file import open_safetensors
from jhessians.interop.torchfile import LazyTensor, open_torch_file

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a folder's weights are looked for in, in transformers' order."""


@runtime_checkable
class StoredTensor(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Number format in the file."""
        ...

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The values, from the disk."""
        ...


@runtime_checkable
class SlicedTensor(StoredTensor, Protocol):
    """A tensor in a file of which a part can be read alone."""

    def read_slice(self, index: Sequence[slice]) -> Shaped[np.ndarray, "..."]:
        """The values in one slice per axis, and nothing else, from the disk."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors.

    Attributes:
        folder: Where it lies.
        tensors: Name → tensor, as the files name them.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]


def open_checkpoint(folder: str | Path, weight_files: Sequence[str] = WEIGHT_FILES) -> Checkpoint:
    """Find a folder's weights and check that all of its files are whole.

    Args:
        folder: Holds one of `weight_files`; for an index also the shards that it names.
        weight_files: What the weights are looked for in, in this order.

    Returns:
        The tensors by name; each is read when it is asked for.

    Raises:
        CheckpointError: If there are no weights, a shard is missing or truncated, a file is a Git
            LFS pointer, or two files hold a tensor of the same name.
    """
    folder = Path(folder)
    name = next((name for name in weight_files if (folder / name).exists()), None)
    if name is None:
        whole = [name for name in weight_files if not name.endswith(".index.json")]
        shards = ", or the index.json of either with its shards" if whole != [*weight_files] else ""
        raise CheckpointError(f"{folder} has no weights; expected {' or '.join(whole)}{shards}")
    if not name.endswith(".index.json"):
        return Checkpoint(folder, _open_file(folder / name))
    index = shard_index(folder / name)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(index.values())):
        if not os.path.exists(folder / file):  # no error for names that can't be
            raise CheckpointError(
                f"{folder} is half downloaded: {name} names {shown(file)}, which isn't there; "
                "download it again"
            )
        for tensor_name, tensor in _open_file(folder / file).items():
            if tensor_name in tensors:
                raise CheckpointError(
                    f"{shown(tensor_name)} is in {index.get(tensor_name, 'another file')} and "
                    f"again in {file} of {folder}; expected one tensor per name"
                )
            tensors[tensor_name] = tensor
    if lost := [tensor for tensor in index if tensor not in tensors]:
        raise CheckpointError(
            f"{name} says that {shown(lost[0])} is in {index[lost[0]]}, which doesn't hold it"
            f"{f' ({len(lost)} such tensors)' if len(lost) > 1 else ''}; download {folder} again"
        )
    return Checkpoint(folder, tensors)


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file of a checkpoint.

    Returns:
        The outermost table, a dict.

    Raises:
        CheckpointError: If it can't be read or holds something else.
    """
    _refuse_pointer(path)
    try:
        value = read_any_json(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} isn't valid JSON; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no table; download it again")
    return value


def shard_index(path: Path) -> dict[str, str]:
    """Tensor → file, as an index.json says.

    Returns:
        The name of the file, beside the index, that holds each tensor.

    Raises:
        CheckpointError: If it isn't an index, or leads out of its folder.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path} has no weight_map; expected a table of tensor to file")
    for file in index.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} names the file {quoted(file)}; expected one beside it")
    return index


def _open_file(path: Path) -> Mapping[str, StoredTensor]:
    _refuse_pointer(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    value = open_torch_file(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected named tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, LazyTensor):
            raise CheckpointError(
                f"{path} holds {quoted(name)}, which isn't a tensor; expected only such"
            )
    return value


def _refuse_pointer(path: Path) -> None:
    try:
        with open_input(path) as file:
            start = file.read(40)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )
