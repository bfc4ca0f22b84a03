"""Random checkpoints on disk, each built once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.oracles import checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`checkpoint(family, **options of build)`: a folder that no test may change."""
    built: dict[str, Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items(), key=str)}"
        if key not in built:
            folder = tmp_path_factory.mktemp(family)
            built[key] = checkpoints.build(family, folder, seed=1, **options)
        return built[key]

    return get


@pytest.fixture
def altered(tmp_path) -> Callable[..., Path]:
    """`altered(folder, **settings)`: a copy whose config.json has other settings."""

    def get(folder: Path, **settings: Any) -> Path:
        copy = tmp_path / f"altered{sum(1 for _ in tmp_path.iterdir())}"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **settings}))
        return copy

    return get
