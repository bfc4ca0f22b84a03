"""What a subcommand is: its options, the words of its help, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Config(Protocol):
    """Options of a subcommand, a frozen dataclass of tables (`jhessians.config`)."""

    quiet: bool
    debug: bool

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        ...

    def validate(self) -> None:
        """Check the options against each other; raises ConfigError."""
        ...


@dataclass(frozen=True)
class Positional:
    """An argument without a flag.

    Attributes:
        name: The config's field.
        help: One sentence.
        example: A command line that has it.
    """

    name: str
    help: str
    example: str


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: As typed.
        summary: A line for the list of commands.
        usage: What follows the program's and the command's name.
        description: A paragraph for its own help.
        examples: Whole command lines.
        config: The class of its options, which needs no JAX.
        positionals: Arguments without a flag, in order.
        run: Does it, given a config that was validated, and returns what is left to say, or None
            on hosts that have nothing to say.
        replays: Whether an earlier run's options can be taken with `--config`.
        shows: Whether what is left to say is all that was asked for, so that it must be said.
        compiles: Whether XLA's compilations are worth keeping for the next run.
    """

    name: str
    summary: str
    usage: str
    description: str
    examples: str
    config: Any
    positionals: tuple[Positional, ...]
    run: Callable[[Any], str | None]
    replays: bool = False
    shows: bool = False
    compiles: bool = False
