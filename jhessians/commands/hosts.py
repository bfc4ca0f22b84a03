"""How a command begins on several hosts: they join, and agree on what they are about to do."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import jax
import jaxlib

import converters
import jhessians
from jhessians.config.fingerprint import BY_CONTENT
from jhessians.config.option import name_flags, options_of, plain_dict
from jhessians.devices import ending
from jhessians.devices.hosts import (
    JOINING,
    STALLED,
    exchange,
    processes,
    require_equal,
    require_same,
    start_hosts,
    together,
)
from jhessians.devices.watch import name_of
from jhessians.errors import OutputError
from jhessians.files import open_input, read_text
from jhessians.interop.manifest import read_manifest
from jhessians.version import __version__

OWN = frozenset({
    "run_path", "out", "overwrite", "resume", "quiet", "debug", "json", "profile_trace",
    "grace_seconds", "timeout_minutes", "join_minutes",
})  # fmt: skip
"""Options that only the first host heeds, or each for itself."""

READ = BY_CONTENT | {
    "hessian", "candidates", "optimizer_state", "processor_path", "run",
}  # fmt: skip
"""Options that name what is read, wherever a host has it; its contents are compared."""

TOKEN, SEEING = ".hosts", 10.0
"""A file that the first host writes, and for how many seconds the others look for it."""

_ENDS = 1 << 20
"""Bytes at the beginning and at the end of a file by which it is known."""


def join_hosts(config: Any, command: str) -> bool:
    """Join the other hosts, if there are any, and check that they are about to do the same.

    Args:
        config: The command's options, validated.
        command: Its name.

    Returns:
        Whether this process writes and speaks for all hosts of the run.

    Raises:
        MeshError: On every host, if code, command or options differ between them.
    """
    minutes = getattr(config, "timeout_minutes", STALLED / 60)
    ending.reword(partial(name_flags, names={each.name for each in options_of(type(config))}))
    start_hosts(
        joining_seconds=60 * getattr(config, "join_minutes", JOINING / 60),
        stalled_seconds=60 * minutes or math.inf,
    )
    if processes() > 1:
        install = "install the same everywhere"
        require_equal(_versions(), install)
        require_same("the sources of jhessians", _sources())
        same = "give all of them the same command"
        require_equal({"the command": command}, same)
        require_equal({f"`{name}`": value for name, value in _options(config).items()}, same)
        machines = {"the platform": jax.default_backend(),
                    "the number of devices": jax.local_device_count()}  # fmt: skip
        require_equal(machines, "take machines of one kind")
    return jax.process_index() == 0


def _versions() -> Mapping[str, Any]:
    found: dict[str, Any] = {
        f"the version of {name}": version
        for name, version in (
            ("jhessians", __version__), ("jax", jax.__version__), ("jaxlib", jaxlib.__version__),
            ("flax", package_version("flax")),
        )
    }  # fmt: skip
    # Of JAX's own settings those that change numbers.
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl",
             "jax_threefry_partitionable")  # fmt: skip
    return found | {name.upper(): str(getattr(jax.config, name)) for name in names}


def _sources() -> str:
    """A hash of our own code: a checkout has the same version from one release to the next."""
    digest = hashlib.sha256()
    for package in (jhessians, converters):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n{read_text(path)}".encode())
    return digest.hexdigest()


def _options(config: Any) -> Mapping[str, Any]:
    """What the options say of the numbers and of the steps that all hosts take together."""
    values = plain_dict(config)
    return {
        name: "given" if name in READ and value is not None else value
        for name, value in values.items()
        if name not in OWN
    }


def require_shared(part: Path, instead: str = "") -> None:
    """Check that all hosts see the folder in which the result grows, before they work on it.

    Args:
        part: Made by the first host.
        instead: What else can be done than to share it.

    Raises:
        OutputError: On every host, if one doesn't.
    """
    if processes() == 1:
        return
    path, first = part / TOKEN, jax.process_index() == 0
    with together():
        token = secrets.token_hex(8)
        if first:
            path.write_text(token, encoding="utf-8")
    token, end = exchange(token)[0], time.monotonic() + SEEING
    while not (seen := _reads(path, token)) and time.monotonic() < end:
        time.sleep(0.1)
    hosts = [host for host, each in enumerate(exchange("seen" if seen else "")) if not each]
    if first:
        path.unlink(missing_ok=True)
    if hosts:
        raise OutputError(
            f"{name_of(hosts[0])} doesn't see what {name_of(0)} writes into {part}; give a folder "
            f"that all hosts share{instead}"
        )


def _reads(path: Path, token: str) -> bool:
    try:
        for folder in (path.parent.parent, path.parent):
            os.listdir(folder)  # or NFS says for a while what was there before
        return read_text(path) == token
    except OSError:
        return False


def require_same_files(**paths: str | Path | None) -> None:
    """Check that files or folders which every host reads for itself are the same.

    Args:
        **paths: What they are in words, with "_" for spaces; None if there is none.

    Raises:
        MeshError: On every host, if one differs.
    """
    if processes() == 1:
        return
    for words, path in paths.items():
        if path is not None:
            require_same(words.replace("_", " "), _known_by(Path(path)))


def _known_by(path: Path) -> str:
    """What tells a large file or folder from another, on whatever disk it lies."""
    if path.is_dir() and (manifest := read_manifest(path)) is not None:
        return manifest.run_id
    digest = hashlib.sha256()
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not each.is_file():
            continue
        size = each.stat().st_size
        digest.update(f"{each.relative_to(path)} {size} ".encode())
        with open_input(each) as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()
