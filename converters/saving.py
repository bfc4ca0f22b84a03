"""Module → Hugging Face checkpoint: the same tensors, names and bits that were loaded.

Tensors leave the devices one at a time, on their way into the file.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from converters import adapters, registry, rules
from converters.companions import write_companions
from converters.loading import parameters
from converters.origin import LoadedModel, whole
from jhessians.devices.hosts import fetch, together
from jhessians.interop.rundir import RunDirectory
from jhessians.interop.safetensors_file import write_safetensors
from jhessians.models.decoder import Decoder

SHARD_BYTES = 50 * 10**9
"""Largest file, in bytes: the one that transformers 5 chooses."""


def save(
    model: Decoder | LoadedModel,
    folder: str | Path,
    *,
    config: Any = None,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers loads; a model with an adapter is refused.

    Beside the weights it holds all that the model's source held (see `converters.companions`), such
    as the tokenizer, generation_config.json and README. On several hosts all call this, and the
    first one writes.

    Args:
        model: As `load` gives it, or its module alone, or one that `create` made; on one device or
            sharded over a mesh.
        folder: Appears under this name once it is complete.
        config: transformers' config instead of the model's own; its dtype is replaced by the
            parameters'.
        tokenizer: transformers' tokenizer instead of the model's own.
        shard_bytes: Above this size weights are divided into several files with an index.
        overwrite: Replace what was saved or converted under that name before.

    Raises:
        CheckpointError: If no family is registered for the config, the model has an adapter, or a
            file of its source can't be read.
        OutputError: If the folder exists, or the disk is full or not ours to write to.
        ValueError: If it isn't known where `model` came from, and no config is given.
    """
    loaded = whole(model, config, tokenizer)
    writer = jax.process_index() == 0
    with RunDirectory(folder, overwrite, command="save", writer=writer) as part:
        write(loaded, part, shard_bytes=shard_bytes)


def write(loaded: LoadedModel, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write into an empty folder that exists; otherwise as `save`."""
    model, config, _ = loaded
    adapters.refuse(model, "which save doesn't write")
    family = registry.family_of(config)
    arrays = {path: variable.get_value() for path, variable in parameters(model).items()}
    wanted = rules.homes(family, {path: array.shape for path, array in arrays.items()})
    writer = jax.process_index() == 0
    with together():
        if writer:
            write_companions(loaded, folder, loaded.dtype)
    files = _divide({name: _bytes(home, arrays) for name, home in wanted.items()}, shard_bytes)
    for file, names in files.items():
        values = (to_theirs(wanted[name], arrays) for name in names)
        if writer:
            kinds = {n: (wanted[n].shape, arrays[wanted[n].parameter].dtype) for n in names}
            write_safetensors(folder / file, kinds, values)
        for _ in values:  # fetching a sharded array needs every process
            pass
    if writer and len(files) > 1:
        _write_index(folder, files, sum(_bytes(home, arrays) for home in wanted.values()))


def to_theirs(home: rules.Home, arrays: Mapping[str, Any]) -> Shaped[np.ndarray, "..."]:
    """One tensor of a checkpoint, from our parameters, on the host."""
    entry = fetch(arrays[home.parameter], lambda array: array[home.index] if home.index else array)
    return home.transform.to_theirs(home.part_of(entry))


def _bytes(home: rules.Home, arrays: Mapping[str, Any]) -> int:
    return math.prod(home.shape) * arrays[home.parameter].dtype.itemsize


def _divide(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File → tensors, each file within the limit unless a single tensor is beyond it."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, start=1)}


def _write_index(folder: Path, files: Mapping[str, list[str]], total: int) -> None:
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
