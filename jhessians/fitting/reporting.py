"""What a fit tells whoever watches it: stages as they advance, notes and warnings."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable


@runtime_checkable
class Stage(Protocol):
    """One step of a fit that is under way."""

    def advance(self, amount: int = 1) -> None:
        """Count more of its work as done.

        Args:
            amount: Units of work.
        """
        ...


@runtime_checkable
class Reporter(Protocol):
    """Shows or records a fit's stages; `jhessians.report.progress.Progress` is one."""

    def stage(
        self, name: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Stage]:
        """Show a stage while the block runs.

        Args:
            name: A noun or two.
            total: Units of work; None if unknown.
            unit: Plural noun of a unit.

        Returns:
            A context manager that gives the stage.
        """
        ...

    def note(self, line: str) -> None:
        """Say something that a user may want to know."""
        ...

    def warn(self, line: str) -> None:
        """Say something that a user should act on."""
        ...


class Silent:
    """A reporter that nobody listens to, nor the stage of one."""

    def stage(
        self, name: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Stage]:
        """A stage that isn't shown."""
        return nullcontext(self)

    def note(self, line: str) -> None:
        """See `Reporter.note`."""

    def warn(self, line: str) -> None:
        """See `Reporter.warn`."""

    def advance(self, amount: int = 1) -> None:
        """See `Stage.advance`."""
