"""Parsers of the commands, made from their options, and the spellings of a flag."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Any, NoReturn

from jhessians.commands.compute_config import ComputeConfig
from jhessians.config.option import (
    FALSE_WORDS,
    TRUE_WORDS,
    Option,
    options_of,
    parse_flag,
)
from jhessians.errors import ConfigError, did_you_mean

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

CONVERT_USAGE = f"{PROGRAM} convert MODEL OUT [options]"
CONVERT_DESCRIPTION = """\
Convert a Hugging Face checkpoint into an Orbax checkpoint of the Flax module,
which --model and converters.load take as well, or one of those back into a
Hugging Face checkpoint: the same names and bits.
"""
CONVERT_EXAMPLES = """\
Flags may be spelt with - or _, and a bare --flag means --flag true.

examples:
  jhessians convert EleutherAI/pythia-160m pythia-flax
  jhessians convert pythia-flax pythia-again
"""


class Parser(argparse.ArgumentParser):
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
    parser = command_parser("compute", COMPUTE_USAGE, COMPUTE_DESCRIPTION, COMPUTE_EXAMPLES)
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
    add_help(general)
    add_options(parser, ComputeConfig)
    return parser


def build_mix_parser() -> argparse.ArgumentParser:
    """The parser of `mix`, from the options of `MixConfig`."""
    from jhessians.commands.mix import MixConfig

    parser = command_parser("mix", MIX_USAGE, MIX_DESCRIPTION, MIX_EXAMPLES)
    add_help(parser.add_argument_group("general"))
    add_options(parser, MixConfig)
    return parser


def build_convert_parser() -> argparse.ArgumentParser:
    """The parser of `convert`, from the options of `ConvertConfig`."""
    from jhessians.commands.convert import ConvertConfig

    parser = command_parser("convert", CONVERT_USAGE, CONVERT_DESCRIPTION, CONVERT_EXAMPLES)
    general = parser.add_argument_group("general")
    general.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="Hugging Face Hub name or local folder of the checkpoint, in either format.",
    )
    general.add_argument("out", nargs="?", metavar="OUT", help="Folder to write.")
    add_help(general)
    add_options(parser, ConvertConfig)
    return parser


def command_parser(name: str, usage: str, description: str, examples: str) -> Parser:
    return Parser(
        prog=f"{PROGRAM} {name}",
        usage=usage,
        description=description,
        epilog=examples,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )


def add_help(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-h", "--help", action="store_true", help="Show this text and leave.")


def add_options(parser: Parser, config_class: type) -> None:
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
        number: Callable[[str], Any] = {"integer": int, "number": float}.get(option.kind, str)
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
