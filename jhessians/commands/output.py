"""The folder or the file that a command writes, kept apart from everything that it reads."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from jhessians.errors import ConfigError
from jhessians.interop.rundir import RunDirectory, output_error


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


def check_json_file(path: Path, *, overwrite: bool) -> None:
    """Check that a file of numbers can be written, before the work that gives them.

    Args:
        path: Of the file.
        overwrite: Whether it may exist.

    Raises:
        ConfigError: If it can't.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--json {path} can't be written; give a file in an existing folder")
    if path.exists() and not overwrite:
        raise ConfigError(f"--json {path} exists; give another name, or --overwrite")


def write_json(document: Any, path: Path) -> None:
    """Write numbers as JSON, whole or not at all.

    Args:
        document: Nested tables in plain types.
        path: The file, which is replaced.

    Raises:
        OutputError: If it can't be written.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise output_error(error, path) from error
    finally:
        part.unlink(missing_ok=True)
