"""What lies beside a model's weights: config.json, the tokenizer, all else that its source held.

Everything is kept but weights, in whatever format, and what is bound to the place: git's own files
and those that keep track of downloads. A symbolic link is replaced by the file to which it leads if
that lies in the same folder, or where the Hub's cache keeps a snapshot's files; no other link is
followed, because it could bring to light what its owner never meant to give away.
"""

import copy
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from converters import registry
from converters.hub import TOKENIZER_FILES, Source, tokenizer_of
from converters.origin import LoadedModel
from jhessians.errors import CheckpointError
from jhessians.files import open_input

WRITTEN = frozenset({"config.json", "flax_checkpoint.json", "parameters", "manifest.json"})
"""What we write ourselves, at the top of the folder."""

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|hdf5|msgpack|onnx|onnx_data|gguf|ggml|tflite|ot|pb|npz|npy"
    r"|pkl|pickle|mlmodel|distcp|nemo|engine|index|data-\d+-of-\d+|index\.json)",
    re.IGNORECASE,
)
_BOUND = frozenset({".git", ".cache", "__pycache__"})
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")  # names of a folder of weights

_log = logging.getLogger("jhessians")


def write_companions(loaded: LoadedModel, folder: Path, dtype: np.dtype) -> None:
    """Write all that is not weights; only one process of a run calls this.

    Args:
        loaded: Its config's architecture and dtype are replaced by the model's. Its tokenizer is
            written by transformers, unless it says the same as the source's files, which are kept.
        folder: Exists.
        dtype: Of the parameters.

    Raises:
        CheckpointError: If no family is registered for the config, or a file of the source can't be
            read.
        OSError: If the disk is full or not ours to write to.
    """
    model, config, tokenizer = loaded
    source = None if model.origin is None else model.origin.source
    if source is not None and not source.folder.is_dir():
        _log.warning(
            "%s, from which the model came, is gone: what it held besides is not kept",
            source.folder,
        )
        source = None
    if source is not None:
        if tokenizer is not None and _written(tokenizer) == _stored_tokenizer(source):
            tokenizer = None
        _keep(source, folder, {*WRITTEN, *(() if tokenizer is None else _names(tokenizer))})
    config = copy.deepcopy(config)
    config.architectures = [registry.family_of(config).architecture]
    config.dtype = dtype.name
    config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def companions(names: Iterable[PurePath]) -> list[PurePath]:
    """Of a folder's files those that aren't weights and go with it anywhere.

    Args:
        names: Of all its files, relative to it.

    Returns:
        Some of them, sorted. Of a subfolder that Orbax wrote there are none: its weights lie in
        files of any name.
    """
    names = list(names)
    orbax = {name.parent for name in names if name.name in _ORBAX} - {PurePath()}
    return sorted(
        name
        for name in names
        if not _WEIGHTS.fullmatch(name.name)
        and _BOUND.isdisjoint(name.parts)
        and orbax.isdisjoint(name.parents)
    )


def _keep(source: Source, folder: Path, without: Collection[str]) -> None:
    """Copy a source's companions but those whose path begins with one of some names."""

    def wanted(names: Iterable[PurePath]) -> list[PurePath]:
        return [name for name in companions(names) if name.parts[0] not in without]

    lost = []
    for name in wanted(map(PurePath, source.files)):
        try:
            source.obtain(str(name))
        except CheckpointError:
            lost.append(str(name))
    root = source.folder.resolve()
    for name in wanted(_files(root, folder.resolve())):
        if not _is_inside(root / name, root):
            lost.append(str(name))
            continue
        try:
            file = open_input(root / name)
        except OSError as error:
            raise _unreadable(error) from None
        with file:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as target:
                shutil.copyfileobj(file, target)
    if lost:
        _log.warning(
            "not kept of %s: %s; expected files of its own that can be had", source.folder,
            ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else ""),
        )  # fmt: skip


def _files(root: Path, target: Path) -> Iterator[PurePath]:
    """Names of all files and links under a folder, but for what is being written there."""

    def refuse(error: OSError) -> None:
        raise _unreadable(error)

    for place, folders, files in os.walk(root, onerror=refuse):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in _BOUND and here / name != target]
        yield from ((here / name).relative_to(root) for name in (*files, *links))


def _unreadable(error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot read {error.filename}: {error.strerror}; expected something to keep beside the "
        "weights; make it readable or remove it"
    )


def _is_inside(path: Path, root: Path) -> bool:
    """Whether a file, or what a link leads to, is an ordinary file of this very source."""
    real = path.resolve()
    places = [root]
    if root.parent.name == "snapshots":  # the Hub's cache, where every file is a link
        places.append(root.parent.parent / "blobs")
    return real.is_file() and any(
        real.is_relative_to(place) and companions([real.relative_to(place)]) for place in places
    )


def _written(tokenizer: Any) -> dict[str, bytes]:
    """The files that transformers writes for a tokenizer."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _stored_tokenizer(source: Source) -> dict[str, bytes] | None:
    """Those that it would write for the source's own."""
    try:
        tokenizer = tokenizer_of(replace(source, adapter=None))
    except CheckpointError:
        return None
    return None if tokenizer is None else _written(tokenizer)


def _names(tokenizer: Any) -> set[str]:
    """All files in which another tokenizer could lie, and be taken for this one."""
    own = getattr(tokenizer, "vocab_files_names", {}).values()
    return {*TOKENIZER_FILES, *own, "additional_chat_templates"}
