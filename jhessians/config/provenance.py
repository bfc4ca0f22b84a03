"""config.yaml: what a run was asked, in bergson's shape and in ours, and where it ran.

`steps` is what bergson reads from a finished run; `jhessians` holds every option, and is what
a replay reads; `metadata` says when, by which version and on which devices.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from jhessians.config.option import Option
from jhessians.errors import ConfigError
from jhessians.interop.layout import INFLUENCE_RESULTS
from jhessians.version import __version__

CONFIG_FILE = "config.yaml"
OLDER_CONFIG_FILE = "config.json"
FORMER_LAYOUT = "seed"  # what version 0.1 called `--layout influence_results`


def bergson_places(options: Sequence[Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of those options that bergson has too, where its config.yaml has them.

    Args:
        options: All of a command's.
        values: Name → value, in plain YAML types.

    Returns:
        Nested tables, keyed as bergson nests them.
    """
    step: dict[str, Any] = {}
    for each in options:
        if each.bergson:
            *folders, leaf = each.bergson.split(".")
            place = step
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = values[each.name]
    return step


def config_document(
    command: str,
    options: Mapping[str, Any],
    step: Mapping[str, Any] | None,
    *,
    devices: Sequence[str] = (),
) -> dict[str, Any]:
    """All of config.yaml.

    Args:
        command: The subcommand.
        options: All of its options, in plain YAML types.
        step: The run as a step of bergson's; None if bergson has no such step.
        devices: See `run_metadata`.

    Returns:
        Three tables: `steps` for bergson, `jhessians` for a replay, and `metadata`.
    """
    return {
        "steps": [] if step is None else [dict(step)],
        "jhessians": {command: dict(options)},
        "metadata": run_metadata(devices),
    }


def read_options(path: str | Path, command: str = "compute") -> dict[str, Any]:
    """The options that a finished run recorded.

    Args:
        path: A run's config.yaml, its config.json, or the folder that holds either.
        command: The subcommand that made the run.

    Returns:
        Name → value, as the run had them, in plain YAML types.

    Raises:
        ConfigError: If the file is missing, is no YAML or was not written by jhessians.
    """
    import yaml

    path = Path(path)
    if path.is_dir():
        # A run that wrote the older tree alone has its options in config.json, which is YAML too.
        older = path / OLDER_CONFIG_FILE
        path = path / CONFIG_FILE
        path = older if older.exists() and not path.exists() else path
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a run's config.yaml") from None
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; give a run's config.yaml"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{path} is not YAML; give a run's config.yaml") from None
    ours = document.get("jhessians") if isinstance(document, dict) else None
    options = ours.get(command) if isinstance(ours, dict) else None
    is_older = command == "compute" and ours is None
    if is_older and isinstance(document, dict) and {"run_path", "method"} <= document.keys():
        options = {name: value for name, value in document.items() if name != "metadata"}
    if not isinstance(options, dict):
        raise ConfigError(
            f"{path} has no 'jhessians: {command}:' part; "
            f"give the config.yaml of a run that jhessians {command} made"
        )
    if options.get("layout") == FORMER_LAYOUT:
        options = {**options, "layout": INFLUENCE_RESULTS}
    return options


def run_metadata(devices: Sequence[str] = ()) -> dict[str, Any]:
    """Versions, time, commit (in a checkout) and the devices, such as ["cpu:0", "cpu:1"]."""
    metadata: dict[str, Any] = {
        "jhessians_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    commit = _git_commit()
    if commit is not None:
        metadata["git_commit"] = commit
    return metadata | {
        "jax_version": _installed_version("jax"),
        "python_version": platform.python_version(),
        "platform": platform.platform(terse=True),
        "devices": list(devices),
    }


def _installed_version(package: str) -> str | None:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Short commit of our own checkout, `-dirty` if changed; None once installed."""
    root = Path(__file__).resolve().parents[2]
    # Without this an installed copy would report the commit of whatever surrounds its venv.
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
