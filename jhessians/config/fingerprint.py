"""What determines a run's numbers, to tell whether an unfinished one can be continued.

No array is looked at here: data and weights come as hashes of their contents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jhessians.errors import ConfigError
from jhessians.files import read_json

VERSION = 2
"""Of what is saved: states of another version can't be read."""

NOT_NUMBERS = frozenset({
    "run_path", "overwrite", "quiet", "debug", "profile", "profile_trace",
    "resume", "checkpoint_minutes", "grace_seconds", "world_size", "fsdp",
})  # fmt: skip
"""Options that change no number of a result, or only its rounding."""

BY_CONTENT = frozenset({"model", "dataset", "tokenizer", "revision", "query"})
"""Options whose contents are compared, wherever they are."""


@dataclass(frozen=True)
class Fingerprint:
    """What determines a run's numbers.

    Attributes:
        options: As they were given.
        settled: Options that the run settled, such as by memory, where they were left open.
        contents: What is read, such as "the data set" → a hash of it.
        devices: Over how many the documents of a batch are divided.
        version: Of what is saved.
    """

    options: Mapping[str, Any]
    settled: Mapping[str, Any]
    contents: Mapping[str, str]
    devices: int
    version: int = VERSION

    def difference(self, options: Mapping[str, Any]) -> str | None:
        """The first option by which another run differs, in words.

        Args:
            options: The other run's, as given or settled.

        Returns:
            None if there is none.
        """
        for name, value in options.items():
            allowed = [self.options.get(name), self.settled.get(name, self.options.get(name))]
            if name not in NOT_NUMBERS | BY_CONTENT and value not in allowed:
                return f"`{name}` is {value!r} and was {allowed[0]!r}"
        return None

    def changed(self, contents: Mapping[str, str]) -> str | None:
        """What is read now and differs from what was read then, such as "the data set"."""
        return next(
            (name for name, value in contents.items() if self.contents.get(name) != value), None
        )

    def write(self, path: Path) -> None:
        """Write to a file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Fingerprint:
        """Read from a file.

        Args:
            path: Of the file.

        Returns:
            As it was written.

        Raises:
            ConfigError: If it can't be read, or is of another version.
        """
        try:
            found = cls(**read_json(path))
        except (OSError, ValueError, TypeError):
            raise ConfigError(
                f"{path} can't be read, so that the unfinished run can't be continued; pass "
                "`overwrite` instead of `resume` to begin anew"
            ) from None
        if found.version != VERSION:
            raise ConfigError(
                f"{path.parent} was saved by another version of jhessians ({found.version}; this "
                f"one reads {VERSION}); go on with that one, or pass `overwrite` instead of "
                "`resume` to begin anew"
            )
        return found
