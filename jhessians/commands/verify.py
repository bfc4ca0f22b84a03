"""`verify`: whether a finished result is still what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jhessians.commands.command import Command, Positional
from jhessians.config.machine import ConsoleOptions
from jhessians.config.option import option
from jhessians.errors import CheckpointError, ConfigError
from jhessians.interop.manifest import MANIFEST, problems, read_manifest

CHECKED = "what is checked"
SHOWN = 5
"""So many files that are wrong are named, the others counted."""


@dataclass(frozen=True)
class VerifyConfig(ConsoleOptions):
    """Options of `verify`."""

    run: str = ""

    deep: bool = option(
        False, "Read every file and compare its SHA-256, not only sizes.", group=CHECKED
    )

    def validate(self) -> None:
        """Raise ConfigError unless the folder is named."""
        if not self.run.strip():
            raise ConfigError("RUN is empty; give the folder of a finished run")
        if self.overwrite:
            raise ConfigError(
                "--overwrite says nothing to verify, which writes nothing; leave it out"
            )

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return False


def verify(config: VerifyConfig) -> str:
    """Compare a result's files with its manifest.

    Returns:
        A line that says that all is well.

    Raises:
        CheckpointError: If there is no manifest, or files are missing, changed or strange; in one
            line that names them.
    """
    folder = Path(config.run)
    manifest = read_manifest(folder)
    if manifest is None:
        what = f"has no {MANIFEST}" if folder.is_dir() else "is no folder"
        raise CheckpointError(
            f"{folder} {what}; expected a finished result of jhessians, which has a {MANIFEST}"
        )
    found = list(problems(folder, manifest, deep=config.deep))
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise CheckpointError(
            f"{folder} is not what {manifest.command} wrote: {'; '.join(found[:SHOWN])}{more}; get "
            "a whole copy or make it again"
        )
    total = sum(entry.size for entry in manifest.files.values())
    how = "sizes and SHA-256" if config.deep else "sizes"
    what = f"{len(manifest.files):,} files of {manifest.command}, {total:,} bytes"
    return f"{folder}: {what}, all there ({how}; run {manifest.run_id})"


DESCRIPTION = """\
Compare the files of a finished result with its manifest.json: whether all are
there, of the right size and, with --deep, of the right content. Says which file
is damaged, and ends with exit code 1 then.
"""
EXAMPLES = """\
  jhessians verify runs/pythia
  jhessians verify runs/pythia --deep
"""

VERIFY = Command(
    name="verify",
    summary="check that a finished result is whole and undamaged",
    usage="RUN [--deep]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=VerifyConfig,
    positionals=(
        Positional("run", "Folder that a command of jhessians wrote.",
                   "jhessians verify runs/pythia"),
    ),
    run=verify,
)  # fmt: skip
