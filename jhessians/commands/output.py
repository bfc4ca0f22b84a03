"""The folder that a command writes, kept apart from everything that it reads."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from jhessians.interop.rundir import RunDirectory


def output_folder(
    config: Any,
    place: str,
    command: str,
    *,
    into: str | Path | None = None,
    writer: bool = True,
) -> RunDirectory:
    """The run directory of a command.

    Args:
        config: Its options, of which those that are names of files or folders are what it reads.
        place: The field that names its output.
        command: Its name.
        into: Where it writes, if not there.
        writer: Whether this process writes.

    Returns:
        Not yet entered.

    Raises:
        OutputError: If it is no folder's name.
    """
    names = [each.name for each in fields(config) if each.name != place]
    values = [getattr(config, name) for name in names]
    inputs = [x for x in values if isinstance(x, str) and x and os.path.exists(x)]
    path = into or getattr(config, place)
    return RunDirectory(
        path, config.overwrite, command=command, inputs=inputs, writer=writer,
        resume=getattr(config, "resume", False),
    )  # fmt: skip
