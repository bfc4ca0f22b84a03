"""Parsers of the commands, made from their options, and the spellings of a flag."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Any, NoReturn

from jhessians.commands.command import Command
from jhessians.config.option import (
    FALSE_WORDS,
    TRUE_WORDS,
    Option,
    options_of,
    parse_flag,
)
from jhessians.errors import ConfigError, did_you_mean

PROGRAM = "jhessians"
LONGEST_MESSAGE = 300
SPELLINGS = "Flags may be spelt with - or _, and a bare --flag means --flag true."


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print, so that every error takes the same way out."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message."""
        message = message.removeprefix("argument ")
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]} ..."
        raise ConfigError(message)


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


def build_parser(command: Command) -> Parser:
    """A subcommand's parser, made from its options."""
    parser = Parser(
        prog=f"{PROGRAM} {command.name}",
        usage=f"{PROGRAM} {command.name} {command.usage}",
        description=command.description,
        epilog=f"{SPELLINGS}\n\nexamples:\n{command.examples}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    general = parser.add_argument_group("general")
    for each in command.positionals:
        general.add_argument(each.name, nargs="?", metavar=each.name.upper(), help=each.help)
    if command.replays:
        general.add_argument(
            "--config",
            metavar="FILE",
            help="Replay a run: take every option from its config.yaml (--overwrite excepted), "
            "then those given here.",
        )
    general.add_argument("-h", "--help", action="store_true", help="Show this text and leave.")
    add_options(parser, command.config)
    return parser


def add_options(parser: Parser, config_class: type) -> None:
    """Give a parser a flag for each option of a config, under the headings of their groups."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for each in options_of(config_class):
        group = groups.setdefault(each.group, parser.add_argument_group(each.group))
        _add_option(group, each)


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    text = f"{option.help} [default: {option.default_in_words}]".replace("%", "%%")
    flag = f"--{option.name}" if len(option.name) > 1 else f"-{option.name}"
    if option.value_type == "flag":
        group.add_argument(
            flag, type=_flag_word, nargs="?", const=True, metavar="true|false", help=text
        )
    elif option.value_type == "list":
        group.add_argument(flag, nargs="+", metavar=option.metavar, help=text)
    elif option.choices:
        # The config checks choices itself: its message suggests near misses.
        metavar = option.metavar or "{" + ",".join(option.choices) + "}"
        group.add_argument(flag, metavar=metavar, help=text)
    else:
        number: Callable[[str], Any] = {"integer": int, "number": float}.get(option.value_type, str)
        if option.words:  # the config knows them
            number = _number_or_word(option)
        group.add_argument(flag, type=number, metavar=option.metavar or "VALUE", help=text)


def _number_or_word(option: Option) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        if word in option.words:
            return word
        try:
            return int(word)
        except ValueError:
            known = " or ".join(option.words)
            raise argparse.ArgumentTypeError(f"{word!r} is no number, nor {known}") from None

    return read


def _flag_word(word: str) -> bool:
    try:
        return parse_flag(word)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def normalize_flags(arguments: Sequence[str], options: Sequence[Option]) -> list[str]:
    """Spell every flag as argparse knows it.

    `--token-batch-size` becomes `--token_batch_size`, and a bare `--fsdp` becomes `--fsdp=true`,
    so that it does not swallow a RUN_PATH that follows.

    Returns:
        The same words with underscores and an explicit value for each bare flag.

    Raises:
        ConfigError: If a flag is unknown, with the nearest ones.
    """
    value_types: dict[str, str] = {each.name: each.value_type for each in options}
    known = [*value_types, "config", "help"]
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
        if len(name) == 1 and name in known and typed == f"-{name}":
            result += [typed, value] if equals else [typed]
            continue
        if name not in known or not typed.startswith("--"):
            hint = did_you_mean(name, known, prefix="--")
            raise ConfigError(f"unknown option {typed}{hint or '; see --help for all'}")
        if value_types.get(name) == "flag" and not equals:
            value = words.pop(0) if words and _is_flag_word(words[0]) else "true"
            equals = "="
        result.append(f"--{name}{equals}{value}")
    return result


def _is_flag_word(word: str) -> bool:
    # Not the digits: a RUN_PATH may be called `1`.
    return word.lower() in TRUE_WORDS + FALSE_WORDS and not word.isdigit()
