"""The command line: parse, run one command, and end every failure in one line.

Exit codes: 0 done; 1 an error in the input or the machine; 2 wrong usage or options; 70 a
fault of jhessians itself; 130 interrupted; 128 + N ended by signal N.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jhessians.cli.console import (
    errors_name_flags,
    quiet_libraries,
    report_failure,
)
from jhessians.cli.memory import require_addresses
from jhessians.cli.parsers import PROGRAM, build_parser, normalize_flags
from jhessians.cli.signals import unwound_by_signals
from jhessians.cli.streams import lasting_streams
from jhessians.commands.command import Command
from jhessians.commands.table import COMMANDS, GROUPS
from jhessians.config.option import check_all, options_of
from jhessians.config.replay import contents_of_run, unfinished_path
from jhessians.devices.ending import keep_quiet
from jhessians.errors import ConfigError, OutputError, did_you_mean, printable
from jhessians.interop.rundir import require_apart
from jhessians.version import __version__


def parse(command: Command, arguments: Sequence[str]) -> Any:
    """The config that a command line asks for, checked as a whole; None for --help.

    Args:
        command: The subcommand.
        arguments: What follows its name.

    Returns:
        An instance of the command's config class; None if help was asked for, and printed.

    Raises:
        ConfigError: If an option is unknown, wrong, or clashes with another, or an argument is
            missing.
    """
    options = options_of(command.config)
    given = vars(build_parser(command).parse_args(normalize_flags(arguments, options)))
    if given.pop("help", False):
        return None
    values: dict[str, Any] = {}
    contents: dict[str, str] = {}
    if (replayed := given.pop("config", None)) is not None:
        # Replacing a folder is a decision for today, not one to repeat from a file.
        resumed = unfinished_path(Path(replayed)) if given.get("resume") else {}
        run_path = given.get("run_path") or resumed.get("run_path")
        earlier = command.config.from_yaml(replayed, run_path=run_path)
        earlier = replace(earlier, overwrite=False)
        values = earlier.resolved_dict() | resumed
        if "resume" in values:
            values["resume"] = False
        contents = contents_of_run(Path(replayed))
    places = [each.name for each in command.positionals]
    values |= {name: given.pop(name) for name in places if name in given}
    for each in command.positionals:
        if each.name not in values:
            lists = [o.name for o in options if o.value_type == "list" and o.name in given]
            before = f" (put it before --{lists[0]})" if lists else ""
            raise ConfigError(
                f"{each.name.upper()} is missing; give it{before}, such as {each.example}"
            )
    fixed = {name: values.pop(name) for name in places}
    config = command.config(**fixed, **check_all(options, values | given, where="the command line"))
    config.validate()
    if replayed is not None:
        config.replaying(contents)
        if config.overwrite:
            require_apart(Path(config.run_path), [replayed])
    return config


def run(command: Command, arguments: Sequence[str], *, on_debug: Callable[[], None]) -> None:
    """Run a subcommand and print what it leaves to say.

    Args:
        command: The subcommand.
        arguments: What follows its name.
        on_debug: Called if tracebacks are wanted from here on.

    Raises:
        ConfigError: If the command line is wrong.
        UserError: If the work fails for a reason that lies in the input.
    """
    config = parse(command, arguments)
    if config is None:
        _say(build_parser(command).format_help().rstrip())
        return
    if config.debug:
        on_debug()
        keep_quiet(False)
    names = {each.name for each in options_of(command.config)}
    with (
        errors_name_flags(names),
        quiet_libraries(debug=config.debug, quiet=config.quiet),
        _float64(config.needs_float64),
    ):
        if command.compiles:
            require_addresses()
            _keep_compilations()
        said = command.run(config)
    if said is not None and not config.quiet:
        _say(said, is_result=command.shows)


def _keep_compilations() -> None:
    """Let a later run of the same shapes find what this one compiles.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false forbids it.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(caches / "jhessians" / "xla"))
    # All of them, wherever they are kept: many short ones take as long as a long one.
    for name, least in (("min_compile_time_secs", 0), ("min_entry_size_bytes", -1)):
        option = f"jax_persistent_cache_{name}"
        if option.upper() not in os.environ:
            jax.config.update(option, least)


@contextmanager
def _float64(wanted: bool) -> Iterator[None]:
    """Let JAX hold 64-bit arrays, which it must know before it makes its first one."""
    if not wanted:
        yield
        return
    import jax

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _say(text: str, *, is_result: bool = True) -> None:
    """Print on standard output.

    Args:
        text: Lines.
        is_result: Whether they are all that was asked for, so that it matters if they get lost;
            but never if a reader, such as `head`, has left.

    Raises:
        OutputError: If they matter and can't be written.
    """
    print(printable(text), flush=True)
    failure = getattr(sys.stdout, "failure", None)
    if is_result and failure is not None and not isinstance(failure, BrokenPipeError):
        raise OutputError(
            f"cannot write to standard output: {failure.strerror or failure}; "
            "send it somewhere else"
        )


def _top_help() -> str:
    summaries: dict[str, str] = {}
    for name, command in COMMANDS.items():
        first = name.split()[0]
        summaries[first] = GROUPS.get(first, command.summary)
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "Kronecker-factored curvature of language models in JAX, for torch bergson.",
        "",
        "commands:",
        *(f"  {name:<12}{summary}" for name, summary in summaries.items()),
        "",
        "options:",
        "  -h, --help  show this text and leave",
        "  --version   show the version and leave",
        "",
        f"`{PROGRAM} COMMAND --help` explains a command.",
        f"To begin: {PROGRAM} compute runs/demo",
    ]
    return "\n".join(lines)


def _group_help(group: str) -> str:
    members = [command for name, command in COMMANDS.items() if name.split()[0] == group]
    lines = [
        f"usage: {PROGRAM} {group} COMMAND ...",
        "",
        "commands:",
        *(f"  {each.name.split()[1]:<12}{each.summary}" for each in members),
        "",
        f"`{PROGRAM} {group} COMMAND --help` explains a command.",
    ]
    return "\n".join(lines)


def _dispatch(arguments: Sequence[str], on_debug: Callable[[], None]) -> None:
    if not arguments:
        raise ConfigError(f"no command given; try {PROGRAM} --help")
    name, *rest = arguments
    if name in GROUPS:
        if not rest or rest[0] in ("-h", "--help"):
            _say(_group_help(name))
            return
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name in ("-h", "--help"):
        _say(_top_help())
    elif name == "--version":
        _say(f"{PROGRAM} {__version__}")
    elif name in COMMANDS:
        run(COMMANDS[name], rest, on_debug=on_debug)
    else:
        hint = did_you_mean(name, COMMANDS) or f"; there are: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name!r}{hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: Words after the program's name, `sys.argv` by default.

    Returns:
        0 if all went well; otherwise the code that goes with the error.
    """
    debug = False

    def on_debug() -> None:
        nonlocal debug
        debug = True

    try:
        with lasting_streams(), unwound_by_signals():
            _dispatch(sys.argv[1:] if arguments is None else list(arguments), on_debug)
    except BaseException as error:
        with lasting_streams():
            if debug:
                print(printable(traceback.format_exc()), file=sys.stderr)
            return report_failure(error)
    return 0
