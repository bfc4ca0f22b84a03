"""Orbax checkpoints of a decoder's parameters, under the module's own paths.

A folder holds what it takes to load them again, with this package or without:

    flax_checkpoint.json    format, version, model_type and dtype
    parameters/             Orbax's checkpoint of the nested dict of parameters
    config.json, ...        transformers' config and tokenizer

Every host writes its own devices' parts and reads no more than its devices will hold.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array

from converters import adapters, orbax_noise, registry, rules
from converters.companions import write_companions
from converters.origin import LoadedModel, whole
from converters.reader import read_json
from jhessians.devices.hosts import together
from jhessians.errors import CheckpointError
from jhessians.files import require_ordinary_files
from jhessians.interop.manifest import check_files
from jhessians.interop.rundir import RunDirectory, output_error
from jhessians.models.decoder import Decoder
from jhessians.version import __version__

FORMAT_FILE = "flax_checkpoint.json"
PARAMETERS = "parameters"
FORMAT, VERSION = "jhessians Flax checkpoint", 1

# A piece of a file that is read or written at once, so that other devices than those that wrote it
# find pieces of what they want: at most this many bytes.
_CHUNK_BYTES = 2**24
_UNDER_WAY_BYTES = 2**26
_SMALL_BYTES = 2**22


@dataclass(frozen=True)
class FlaxCheckpoint:
    """A folder whose parameters aren't read yet.

    Attributes:
        folder: Where it lies.
        stored: Path of a parameter → Orbax's description, with its shape and dtype.
    """

    folder: Path
    stored: Mapping[str, Any]

    @property
    def dtypes(self) -> set[np.dtype]:
        """Of the parameters."""
        return {np.dtype(each.dtype) for each in self.stored.values()}

    def restore(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
        """Read parameters straight onto their devices.

        Args:
            wanted: Shape, dtype and sharding by path, of all parameters.

        Returns:
            The parameters by path, in the dtypes and shardings wanted.

        Raises:
            CheckpointError: If parameters are missing, left over or of another shape, or the files
                are damaged.
        """
        self._check(wanted)
        import orbax.checkpoint as ocp

        # Orbax keeps what is under way below a limit, which must exceed the largest single read.
        largest = max(_largest_read(self.stored[path], each) for path, each in wanted.items())
        limit: Any = max(_UNDER_WAY_BYTES, largest + 1) / 10**9  # a fraction does, too
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=limit)
        with orbax_noise.one_line(self.folder), ocp.Checkpointer(handler) as reader:
            restored = reader.restore(
                (self.folder / PARAMETERS).absolute(),
                args=ocp.args.StandardRestore(_nested(dict(wanted))),
            )
        return traverse_util.flatten_dict(restored, sep=".")

    def _check(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        misshapen = [
            f"{path} is {list(self.stored[path].shape)} where config.json makes it "
            f"{list(each.shape)}"
            for path, each in wanted.items()
            if path in self.stored and tuple(self.stored[path].shape) != tuple(each.shape)
        ]
        kinds = {
            "missing": sorted(wanted.keys() - self.stored.keys()),
            "unexpected": sorted(self.stored.keys() - wanted.keys()),
            "misshapen": misshapen,
        }
        if problems := [
            f"{kind}: {', '.join(names[:3])}" for kind, names in kinds.items() if names
        ]:
            raise CheckpointError(
                f"{self.folder} doesn't fit its config.json: {'; '.join(problems)}; "
                "convert it again"
            )


def is_flax(folder: Path) -> bool:
    """Whether a folder is one of these, or what is left of one.

    Returns:
        True also where one of the two parts is missing: `open_flax` says which.

    Raises:
        CheckpointError: If it is an Orbax checkpoint and nothing more.
    """
    if (folder / "_CHECKPOINT_METADATA").is_file() or (folder / "_METADATA").is_file():
        raise CheckpointError(
            f"{folder} is an Orbax checkpoint without a model's config.json; expected the folder "
            f"that `jhessians convert` wrote, with {FORMAT_FILE}"
        )
    return (folder / FORMAT_FILE).is_file() or (folder / PARAMETERS / "_METADATA").is_file()


def open_flax(folder: Path, model_type: str) -> FlaxCheckpoint:
    """Look at a folder's parameters without reading them.

    Args:
        folder: One for which `is_flax` holds.
        model_type: What its config.json says.

    Returns:
        Its parameters by path, with shapes and dtypes.

    Raises:
        CheckpointError: If it isn't complete, of another version or another model.
    """
    path = folder / FORMAT_FILE
    remedy = "convert or copy it again"
    for part in (path, folder / PARAMETERS / "_METADATA"):
        if not part.exists():
            raise CheckpointError(f"{folder} is half written: it has no {part.name}; {remedy}")
    header = read_json(path)
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} isn't that of a {FORMAT}; {remedy}")
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} is a {FORMAT} of version {header.get('version')!r}; expected {VERSION}; "
            "convert it again with this version of jhessians, or read it with its own"
        )
    if header.get("model_type") != model_type:
        raise CheckpointError(
            f"{path} says {header.get('model_type')!r} where config.json says {model_type!r}; "
            f"expected one model; {remedy}"
        )
    check_files(folder, lambda name: name == FORMAT_FILE or name.startswith(f"{PARAMETERS}/"))
    import orbax.checkpoint as ocp

    with orbax_noise.one_line(folder), ocp.StandardCheckpointer() as reader:
        require_ordinary_files(folder / PARAMETERS)
        tree = reader.metadata((folder / PARAMETERS).absolute()).item_metadata.tree
        stored = traverse_util.flatten_dict(tree, sep=".")
        if any(np.dtype(each.dtype).kind not in "fV" for each in stored.values()):
            raise ValueError("a parameter is no floating-point array")
    return FlaxCheckpoint(folder, stored)


def save_flax(
    model: Decoder | LoadedModel,
    folder: str | Path,
    *,
    config: Any = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that `converters.load` and Orbax read; on several hosts, all call it.

    Beside the parameters it holds what `converters.save` would keep.

    Args:
        model: As `load` gives it, or its module alone, or one that `create` made; on one device or
            sharded over a mesh.
        folder: Appears under this name once it is complete; all hosts see it.
        config: transformers' config instead of the model's own; its dtype is replaced by the
            parameters'.
        tokenizer: transformers' tokenizer instead of the model's own.
        overwrite: Replace what was saved or converted under that name before.

    Raises:
        CheckpointError: If no family is registered for the config, the model has an adapter, or a
            file of its source can't be read.
        OutputError: If the folder exists, or the disk is full or not ours to write to.
        ValueError: If it isn't known where `model` came from, and no config is given.
    """
    loaded = whole(model, config, tokenizer)
    writer = jax.process_index() == 0
    directory = RunDirectory(folder, overwrite, command="save_flax", writer=writer)
    with ExitStack() as stack:
        with together():
            part = stack.enter_context(directory)
        write_flax(loaded, part)
        with together():
            stack.close()


def write_flax(loaded: LoadedModel, folder: Path) -> None:
    """Write into an empty folder that exists; otherwise as `save_flax`."""
    import orbax.checkpoint as ocp

    model, config, _ = loaded
    arrays = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    adapters.refuse(model, "which a Flax checkpoint doesn't hold")
    family = registry.family_of(config)
    rules.homes(family, {path: array.shape for path, array in arrays.items()})  # all have names
    with together():
        if jax.process_index() == 0:
            write_companions(loaded, folder, loaded.dtype)
    small = {path for path, array in arrays.items() if array.nbytes < _SMALL_BYTES}
    handler = ocp.PyTreeCheckpointHandler(
        # At most this much, or one parameter, leaves the devices at a time; Orbax exempts what has
        # priority, and grumbles if nothing has.
        save_device_host_concurrent_gb=1,
        is_prioritized_key_fn=lambda keys: jax.tree_util.keystr(
            keys, simple=True, separator="."
        ) in small,
    )  # fmt: skip
    pieces = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for path in arrays}
    try:
        with orbax_noise.quietly(), ocp.Checkpointer(handler) as writer:
            writer.save(
                (folder / PARAMETERS).absolute(),
                args=ocp.args.PyTreeSave(_nested(arrays), _nested(pieces)),
            )
    except Exception as error:
        # TensorStore tells the operating system's number in words.
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if number is None:
            raise
        raise output_error(OSError(int(number[1]), str(error)), folder) from error
    with together():
        if jax.process_index() == 0:
            header = {
                "format": FORMAT,
                "version": VERSION,
                "model_type": config.model_type,
                "dtype": loaded.dtype.name,
                "jhessians": __version__,
            }
            (folder / FORMAT_FILE).write_text(json.dumps(header, indent=2) + "\n")


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(flat, sep=".")


def _largest_read(stored: Any, wanted: jax.ShapeDtypeStruct) -> int:
    """Bytes of the whole pieces of a file in which the largest part for a device of ours lies."""
    pieces = stored.storage.chunk_shape if stored.storage else stored.shape
    size = max(np.dtype(stored.dtype).itemsize, wanted.dtype.itemsize)
    assert wanted.sharding is not None
    parts = wanted.sharding.addressable_devices_indices_map(wanted.shape).values()
    largest = 0
    for part in parts:
        bounds = [cut.indices(n)[:2] for cut, n in zip(part or (), wanted.shape, strict=True)]
        lengths = [
            (-(-stop // piece) - start // piece) * piece
            for (start, stop), piece in zip(bounds, pieces, strict=True)
        ]
        largest = max(largest, size * math.prod(lengths))
    return largest
