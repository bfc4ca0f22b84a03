"""The command line: parse, run one command, and end every failure in one line.

Exit codes: 0 done; 1 an error in the input or the machine; 2 wrong usage or options; 70 a
fault of jhessians itself; 130 interrupted; 128 + N ended by signal N.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import NoReturn

from jhessians.config import ComputeConfig
from jhessians.console import quiet_libraries, report_failure, unwound_by_signals
from jhessians.errors import ConfigError
from jhessians.options import (
    FALSE_WORDS,
    TRUE_WORDS,
    Option,
    check_all,
    did_you_mean,
    options_of,
    parse_flag,
)
from jhessians.progress import Progress
from jhessians.version import __version__

PROGRAM = "jhessians"

COMPUTE_USAGE = f"{PROGRAM} compute RUN_PATH [--model NAME --dataset NAME] [options]"
COMPUTE_DESCRIPTION = """\
Fit a language model's Hessian, Kronecker-factored or dense, and write it as
torch bergson reads it. Without --model and --dataset a small embedded demo is
used.
"""
COMPUTE_EXAMPLES = """\
Flags may be spelt with - or _, and a bare --flag means --flag true.

examples:
  jhessians compute runs/demo
  jhessians compute runs/pythia --model EleutherAI/pythia-160m \\
      --dataset NeelNanda/pile-10k --max_tokens 1000000 --truncation
"""

MIX_USAGE = f"{PROGRAM} mix --query_path PATH --index_path PATH --output_path PATH [options]"
MIX_DESCRIPTION = """\
Mix two autocorrelation Hessians into one, with the coefficient at which their
spectra cross (Chang et al. 2024, arXiv:2410.17413, section A.1.3).
"""
MIX_EXAMPLES = """\
Flags may be spelt with - or _, and a bare --flag means --flag true.

examples:
  jhessians mix --query_path runs/queries --index_path runs/index \\
      --output_path runs/mixed
"""


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print, so that every error takes the same way out."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Texts in one column, at most 100 columns in all, and no default torn in two."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, max_help_position=26, width=max(40, min(columns, 100) - 2))

    def _split_lines(self, text: str, width: int) -> list[str]:
        meaning, bracket, default = text.partition(" [default: ")
        lines = wrap(meaning, width)
        if bracket:
            default = f"[default: {default}"
            if len(lines[-1]) + 1 + len(default) <= width:
                lines[-1] += f" {default}"
            else:
                lines += wrap(default, width)
        return lines


def build_compute_parser() -> argparse.ArgumentParser:
    """The parser of `compute`, from the options of `ComputeConfig`."""
    parser = _command_parser("compute", COMPUTE_USAGE, COMPUTE_DESCRIPTION, COMPUTE_EXAMPLES)
    general = parser.add_argument_group("general")
    general.add_argument(
        "run_path", nargs="?", metavar="RUN_PATH", help="Folder to write; must not exist yet."
    )
    general.add_argument(
        "--config",
        metavar="FILE",
        help="Replay a run: take every option from its config.yaml (--overwrite excepted), "
        "then those given here.",
    )
    _add_help(general)
    _add_options(parser, ComputeConfig)
    return parser


def build_mix_parser() -> argparse.ArgumentParser:
    """The parser of `mix`, from the options of `MixConfig`."""
    from jhessians.mix import MixConfig

    parser = _command_parser("mix", MIX_USAGE, MIX_DESCRIPTION, MIX_EXAMPLES)
    _add_help(parser.add_argument_group("general"))
    _add_options(parser, MixConfig)
    return parser


def _command_parser(name: str, usage: str, description: str, examples: str) -> _Parser:
    return _Parser(
        prog=f"{PROGRAM} {name}",
        usage=usage,
        description=description,
        epilog=examples,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )


def _add_help(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-h", "--help", action="store_true", help="Show this text and leave.")


def _add_options(parser: _Parser, config_class: type) -> None:
    groups: dict[str, argparse._ArgumentGroup] = {}
    for each in options_of(config_class):
        group = groups.setdefault(each.group, parser.add_argument_group(each.group))
        _add_option(group, each)


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    text = f"{option.help} [default: {option.default_in_words}]".replace("%", "%%")
    flag = f"--{option.name}"
    if option.kind == "flag":
        group.add_argument(
            flag, type=_flag_word, nargs="?", const=True, metavar="true|false", help=text
        )
    elif option.kind == "list":
        group.add_argument(flag, nargs="+", metavar=option.metavar, help=text)
    elif option.choices:
        # The config checks choices itself: its message suggests near misses.
        metavar = option.metavar or "{" + ",".join(option.choices) + "}"
        group.add_argument(flag, metavar=metavar, help=text)
    else:
        number = {"integer": int, "number": float}.get(option.kind, str)
        group.add_argument(flag, type=number, metavar=option.metavar or "VALUE", help=text)


def _flag_word(word: str) -> bool:
    try:
        return parse_flag(word)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def normalize_flags(arguments: Sequence[str], options: Sequence[Option]) -> list[str]:
    """Spell every flag as argparse knows it.

    `--token-batch-size` becomes `--token_batch_size`, and a bare `--fsdp` becomes `--fsdp=true`,
    so that it does not swallow a RUN_PATH that follows.

    Raises:
        ConfigError: If a flag is unknown, with the nearest ones.
    """
    kinds: dict[str, str] = {each.name: each.kind for each in options}
    known = [*kinds, "config", "help"]
    result: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*result, word, *words]
        # A lone dash with a digit is a negative number.
        if word == "-h" or not word.startswith("-") or not word.lstrip("-")[:1].isalpha():
            result.append(word)
            continue
        typed, equals, value = word.partition("=")
        name = typed.lstrip("-").replace("-", "_")
        if name not in known or not typed.startswith("--"):
            hint = did_you_mean(name, known, prefix="--")
            raise ConfigError(f"unknown option {typed}{hint or '; see --help for all'}")
        if kinds.get(name) == "flag" and not equals:
            value = words.pop(0) if words and _is_flag_word(words[0]) else "true"
            equals = "="
        result.append(f"--{name}{equals}{value}")
    return result


def _is_flag_word(word: str) -> bool:
    # Not the digits: a RUN_PATH may be called `1`.
    return word.lower() in TRUE_WORDS + FALSE_WORDS and not word.isdigit()


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
    """`jhessians compute`: calls `jhessians.pipeline.compute` and prints its summary.

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
        from jhessians.pipeline import compute
        from jhessians.report.summary import render

        _keep_compilations()
        progress = Progress(quiet=config.quiet)
        summary = compute(config, progress)
        # The pipeline quietens every process but the first one of several hosts.
        if not progress.quiet:
            _say(render(summary))


def run_mix(arguments: Sequence[str], *, on_debug: Callable[[], None]) -> None:
    """`jhessians mix`: calls `jhessians.mix.mix` and prints its line; arguments as `run_compute`.

    Raises:
        ConfigError: If an option is unknown, wrong or missing.
    """
    from jhessians.mix import MixConfig, mix

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


def _keep_compilations() -> None:
    """Let a later run of the same shapes find what this one compiles.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false forbids it.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(caches / "jhessians" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
