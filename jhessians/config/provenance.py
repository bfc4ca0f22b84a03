"""config.yaml: what a run was asked, in bergson's shape and in ours, and where it ran.

`steps` is what bergson reads from a finished run; `jhessians` holds every option, and is what
a replay reads; `metadata` says when, by which version and on which devices.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from jhessians.commands.compute_config import ComputeConfig
from jhessians.config.option import options_of
from jhessians.errors import ConfigError
from jhessians.version import __version__

CONFIG_FILE = "config.yaml"
SEED_CONFIG_FILE = "config.json"


def to_bergson_dict(
    config: ComputeConfig, *, model: str, dataset: str, shards: int, processes: int = 1
) -> dict[str, Any]:
    """The run as one `hessian` step of bergson 2.5.1.

    Args:
        config: The run's options.
        model: Name or folder of the model that was used, the demo's too.
        dataset: The same for the data set.
        shards: Files per factor. bergson has one process per shard, so this becomes its
            world size.
        processes: Hosts that took part; kept as bergson's nodes where they divide the shards.

    Returns:
        `{"hessian_cfg": {...}, "index_cfg": {...}}`, in plain YAML types.
    """
    step: dict[str, Any] = {
        "hessian_cfg": {
            "method": config.bergson_method,
            "ev_correction": config.corrects_eigenvalues,
        },
        "index_cfg": {"run_path": config.run_path},
    }
    values = config.resolved_dict() | {
        "model": model,
        "dataset": dataset,
        # bergson writes "the model's own" as an empty name.
        "tokenizer": config.tokenizer or "",
        "optimizer_state": config.optimizer_state or "",
        "moe_experts": config.moe_experts or "",
        # Its own default, which only heads that are split would mind.
        "head_dim": config.head_dim if config.split_attention_modules else 0,
        "use_dataset_labels": config.takes_dataset_labels,
    }
    for each in options_of(ComputeConfig):
        if each.bergson:
            *folders, leaf = each.bergson.split(".")
            place = step
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = values[each.name]
    nodes = processes if shards % processes == 0 else 1
    step["index_cfg"]["distributed"] = {"nnode": nodes, "nproc_per_node": shards // nodes}
    return step


def config_document(
    config: ComputeConfig,
    *,
    model: str,
    dataset: str,
    shards: int,
    processes: int = 1,
    devices: Sequence[str] = (),
) -> dict[str, Any]:
    """All of config.yaml; arguments as in `to_bergson_dict`, `devices` as in `run_metadata`."""
    step = to_bergson_dict(config, model=model, dataset=dataset, shards=shards, processes=processes)
    return {
        "steps": [{"hessian": step}],
        "jhessians": {"compute": config.resolved_dict()},
        "metadata": run_metadata(devices),
    }


def read_options(path: str | Path) -> dict[str, Any]:
    """The options that a finished run recorded.

    Args:
        path: A run's config.yaml, its config.json, or the folder that holds either.

    Raises:
        ConfigError: If the file is missing, is no YAML or was not written by jhessians.
    """
    import yaml

    path = Path(path)
    if path.is_dir():
        # A run in the seed's layout alone has its options in config.json, which YAML reads too.
        folder, path = path, path / CONFIG_FILE
        path = (
            path
            if path.exists() or not (folder / SEED_CONFIG_FILE).exists()
            else (folder / SEED_CONFIG_FILE)
        )
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a run's config.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not YAML; give a run's config.yaml") from None
    ours = document.get("jhessians") if isinstance(document, dict) else None
    options = ours.get("compute") if isinstance(ours, dict) else None
    if ours is None and isinstance(document, dict) and {"run_path", "method"} <= document.keys():
        options = {name: value for name, value in document.items() if name != "metadata"}
    if not isinstance(options, dict):
        raise ConfigError(
            f"{path} has no 'jhessians: compute:' part; "
            "give the config.yaml of a run that jhessians made"
        )
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
    root = Path(__file__).resolve().parent.parent
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
