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
from dataclasses import dataclass, replace
from pathlib import Path

from jhessians.cli.console import quiet_libraries, report_failure, unwound_by_signals
from jhessians.cli.parsers import (
    CONVERT_USAGE,
    PROGRAM,
    build_compute_parser,
    build_convert_parser,
    build_mix_parser,
    normalize_flags,
)
from jhessians.commands.compute_config import ComputeConfig
from jhessians.config.option import check_all, options_of
from jhessians.errors import ConfigError, did_you_mean
from jhessians.report.progress import Progress
from jhessians.version import __version__


def parse_compute(arguments: Sequence[str]) -> ComputeConfig | None:
    """The config that a `compute` command line asks for, checked as a whole; None for --help.

    Raises:
        ConfigError: If an option is unknown, wrong, or clashes with another.
    """
    parser = build_compute_parser()
    given = vars(parser.parse_args(normalize_flags(arguments, options_of(ComputeConfig))))
    if given.pop("help", False):
        return None
    replayed = given.pop("config", None)
    values = {}
    if replayed is not None:
        # Replacing a folder is a decision for today, not one to repeat from a file.
        values = replace(ComputeConfig.from_yaml(replayed), overwrite=False).resolved_dict()
    run_path = given.pop("run_path", None)
    if run_path is not None:
        values["run_path"] = run_path
    if "run_path" not in values:
        after = " (put it before --modules)" if "modules" in given else ""
        raise ConfigError(
            f"RUN_PATH is missing; give the folder to write{after}, "
            f"such as {PROGRAM} compute runs/demo"
        )
    config = ComputeConfig.from_dict(values | given, where="the command line")
    config.validate()
    return config


def run_compute(arguments: Sequence[str], *, on_debug: Callable[[], None]) -> None:
    """`jhessians compute`: calls `jhessians.commands.compute.compute` and prints its summary.

    Args:
        arguments: What follows the command's name.
        on_debug: Called if tracebacks are wanted from here on.
    """
    config = parse_compute(arguments)
    if config is None:
        _say(build_compute_parser().format_help().rstrip())
        return
    if config.debug:
        on_debug()
    with quiet_libraries(debug=config.debug, quiet=config.quiet), _float64(config.needs_float64):
        # jax and transformers take seconds to import: --help must not wait for them.
        from jhessians.commands.compute import compute
        from jhessians.report.summary import render

        _keep_compilations()
        progress = Progress(quiet=config.quiet)
        summary = compute(config, progress)
        # The pipeline quietens every process but the first one of several hosts.
        if not progress.quiet:
            _say(render(summary))


def run_mix(arguments: Sequence[str], *, on_debug: Callable[[], None]) -> None:
    """`jhessians mix`: calls `jhessians.commands.mix.mix` and prints its line; arguments as
    `run_compute`.

    Raises:
        ConfigError: If an option is unknown, wrong or missing.
    """
    from jhessians.commands.mix import MixConfig, mix

    parser = build_mix_parser()
    options = options_of(MixConfig)
    given = vars(parser.parse_args(normalize_flags(arguments, options)))
    if given.pop("help", False):
        _say(parser.format_help().rstrip())
        return
    config = MixConfig(**check_all(options, given, where="the command line"))
    if config.debug:
        on_debug()
    with quiet_libraries(debug=config.debug, quiet=config.quiet):
        summary = mix(config)
    if not config.quiet:
        _say(summary.render())


def run_convert(arguments: Sequence[str], *, on_debug: Callable[[], None]) -> None:
    """`jhessians convert`: calls `jhessians.commands.convert.convert`; arguments as `run_compute`.

    Raises:
        ConfigError: If an option is unknown or wrong, or a place is missing.
    """
    from jhessians.commands.convert import ConvertConfig, convert

    parser = build_convert_parser()
    options = options_of(ConvertConfig)
    given = vars(parser.parse_args(normalize_flags(arguments, options)))
    if given.pop("help", False):
        _say(parser.format_help().rstrip())
        return
    places = {name: given.pop(name, None) for name in ("model", "out")}
    for name, place in places.items():
        if place is None:
            raise ConfigError(f"{name.upper()} is missing; usage: {CONVERT_USAGE}")
    config = ConvertConfig(**places, **check_all(options, given, where="the command line"))
    config.validate()
    if config.debug:
        on_debug()
    with quiet_libraries(debug=config.debug, quiet=config.quiet), _float64(config.needs_float64):
        progress = Progress(quiet=config.quiet)
        summary = convert(config, progress)
        if not progress.quiet:
            _say(summary.render())


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


@dataclass(frozen=True)
class Command:
    """A subcommand: a line for `--help`, and what runs it."""

    summary: str
    run: Callable[..., None]


COMMANDS = {
    "compute": Command("fit a Hessian approximation of a model on a data set", run_compute),
    "mix": Command("mix two autocorrelation Hessians into one", run_mix),
    "convert": Command("convert a checkpoint from Hugging Face to Flax, or back", run_convert),
}


def _say(text: str) -> None:
    """Print on standard output, whose reader, such as `head`, may have left."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _top_help() -> str:
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "Kronecker-factored curvature of language models in JAX, for torch bergson.",
        "",
        "commands:",
        *(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()),
        "",
        "options:",
        "  -h, --help  show this text and leave",
        "  --version   show the version and leave",
        "",
        f"`{PROGRAM} COMMAND --help` explains a command.",
        f"To begin: {PROGRAM} compute runs/demo",
    ]
    return "\n".join(lines)


def _dispatch(arguments: Sequence[str], on_debug: Callable[[], None]) -> None:
    if not arguments:
        raise ConfigError(f"no command given; try {PROGRAM} --help")
    name, *rest = arguments
    if name in ("-h", "--help"):
        _say(_top_help())
    elif name == "--version":
        _say(f"{PROGRAM} {__version__}")
    elif name in COMMANDS:
        COMMANDS[name].run(rest, on_debug=on_debug)
    else:
        hint = did_you_mean(name, COMMANDS) or f"; there are: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name!r}{hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: Words after the program's name, `sys.argv` by default.
    """
    debug = False

    def on_debug() -> None:
        nonlocal debug
        debug = True

    try:
        with unwound_by_signals():
            _dispatch(sys.argv[1:] if arguments is None else list(arguments), on_debug)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return report_failure(error)
    return 0
