"""A subcommand's options as a whole: checked when they are set, and read back from config.yaml."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from jhessians.config.option import check_all, options_of, plain_dict
from jhessians.config.provenance import read_options
from jhessians.errors import ConfigError
from jhessians.interop.manifest import read_manifest


class Replayable:
    """Base of a config dataclass whose first field is `run_path`; the others are its options.

    Attributes:
        command: The subcommand's name.
        run_path: The folder to write.

    Raises:
        ConfigError: If a value has the wrong type, or lies outside its choices or range.
    """

    command: ClassVar[str]
    run_path: str

    @property
    def replayed(self) -> Mapping[str, str]:
        """What the run that is replayed read, by hashes; empty if none is."""
        return self.__dict__.get("_replayed", {})

    def replaying(self, contents: Mapping[str, str]) -> Self:
        """This config, with what the run that it replays has read."""
        object.__setattr__(self, "_replayed", dict(contents))
        return self

    def __post_init__(self) -> None:
        object.__setattr__(self, "run_path", os.fspath(self.run_path))
        options = options_of(type(self))
        values = {each.name: getattr(self, each.name) for each in options}
        for name, value in check_all(options, values, where="the config").items():
            object.__setattr__(self, name, value)

    def resolved_dict(self) -> dict[str, Any]:
        """Every option under its name, in plain YAML types; `from_dict` reads it back."""
        return plain_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "the config") -> Self:
        """Build a config from names and values; what is missing keeps its default.

        Returns:
            A config whose values have their types; how they go together isn't checked yet.

        Raises:
            ConfigError: If a name is unknown, a value is wrong or `run_path` is missing.
        """
        values = dict(values)
        run_path = values.pop("run_path", None)
        if not isinstance(run_path, str):
            raise ConfigError(f"{where} has no run_path; give the folder to write")
        checked = check_all(options_of(cls), values, where=where)
        return cls(run_path=run_path, **checked)  # type: ignore[call-arg]

    @classmethod
    def from_yaml(cls, path: str | Path, *, run_path: str | None = None) -> Self:
        """The config of an earlier run, from its config.yaml or the folder that holds it.

        Args:
            path: The file or the folder.
            run_path: Another folder to write than the earlier run's.

        Returns:
            A config that makes the same run again.

        Raises:
            ConfigError: If the file is missing, is no YAML or holds no options of ours.
        """
        other = {} if run_path is None else {"run_path": run_path}
        return cls.from_dict(read_options(path, cls.command) | other, where=str(path))


DATA = "the data set"
"""Among what a run read."""


def contents_of_run(path: Path) -> dict[str, str]:
    """What a finished run read, such as "the data set" → a hash of it.

    Args:
        path: Its folder, or its config.yaml.

    Returns:
        Empty if it has no manifest.

    Raises:
        CheckpointError: If its manifest can't be read.
    """
    manifest = read_manifest(path if path.is_dir() else path.parent)
    return {} if manifest is None else manifest.inputs


def unfinished_path(path: Path) -> dict[str, str]:
    """`run_path` of an unfinished run, by where it is.

    Args:
        path: Its folder, whose name ends with ".part", or its config.yaml.

    Returns:
        The option; empty if the path isn't an unfinished run's.
    """
    folder = Path(os.path.abspath(path if path.is_dir() else path.parent))
    return {"run_path": str(folder.with_suffix(""))} if folder.suffix == ".part" else {}
