"""The shape of one option: what the parser, `--help` and config.yaml all read.

A run's options are the fields of a frozen dataclass; `option` hangs on each what a reader
needs to know, and `check` turns a value from a terminal or a file into the field's type.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from jhessians.errors import ConfigError, did_you_mean

ValueType = Literal["text", "integer", "number", "flag", "list"]

_TYPES: dict[str, tuple[Any, str]] = {
    "text": (str, "text"),
    "integer": (int, "a whole number"),
    "number": ((int, float), "a number"),
    "flag": (bool, "true or false"),
}
TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
LARGEST_INTEGER = 2**31 - 1
"""Of options that don't say otherwise: devices count in 32 bits."""


@dataclass(frozen=True)
class Option:
    """What is known of one option besides its value.

    Attributes:
        name: The field's name; `--name` on the command line.
        default: The value when nothing is said.
        help: One or two sentences.
        group: Heading in `--help`.
        value_type: How a value is read.
        unit: Unit of an integer, such as "tokens".
        metavar: Placeholder for the value in `--help`.
        choices: The only values allowed, if any.
        minimum: Smallest number allowed; `-LARGEST_INTEGER` of integers that don't say.
        maximum: Largest number allowed; `LARGEST_INTEGER` of integers that don't say.
        default_text: The default in words, where the value alone says too little.
        words: Words that are allowed where a number is expected.
        bergson: Dotted place in bergson's config.yaml, empty if the option is ours alone.
    """

    name: str
    default: Any
    help: str
    group: str
    value_type: ValueType
    unit: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    default_text: str = ""
    words: tuple[str, ...] = ()
    bergson: str = ""

    @property
    def default_in_words(self) -> str:
        """The default as a reader sees it, with its unit."""
        if self.default_text:
            return self.default_text
        if isinstance(self.default, bool):
            return "true" if self.default else "false"
        return f"{self.default} {self.unit}".rstrip()


def option(
    default: Any, help: str, *, group: str, value_type: ValueType | None = None, **more: Any
) -> Any:
    """A dataclass field that carries an `Option`; `value_type` follows the default unless given."""
    value_types: dict[type, ValueType] = {
        bool: "flag", int: "integer", float: "number", str: "text", tuple: "list"
    }  # fmt: skip
    value_type = value_type or value_types.get(type(default), "text")
    return field(
        default=default, metadata={"help": help, "group": group, "value_type": value_type} | more
    )


def options_of(config_class: type) -> tuple[Option, ...]:
    """The options of a config dataclass, in order; fields without help text are left out."""
    return tuple(
        Option(name=each.name, default=each.default, **each.metadata)
        for each in dataclasses.fields(config_class)
        if "help" in each.metadata
    )


def reworded(table: type, group: str, **helps: str) -> type:
    """The options of a table under another heading, for a command where they do something else.

    Args:
        table: A dataclass of options.
        group: The heading in `--help`.
        **helps: Option → its help there; others keep theirs.

    Returns:
        A dataclass that inherits from the table.
    """
    fields = []
    for each in dataclasses.fields(table):
        metadata = dict(each.metadata) | {"group": group}
        if each.name in helps:
            metadata["help"] = helps[each.name]
        fields.append((each.name, each.type, field(default=each.default, metadata=metadata)))
    return dataclasses.make_dataclass(
        f"{table.__name__}Reworded", fields, bases=(table,), frozen=True
    )


def parse_flag(word: str) -> bool:
    """Read `true` or `false` as typed.

    Returns:
        The truth value of the word.

    Raises:
        ConfigError: If the word is neither.
    """
    if word.lower() in TRUE_WORDS:
        return True
    if word.lower() in FALSE_WORDS:
        return False
    raise ConfigError(f"{word!r} is neither true nor false")


def check(option: Option, value: Any) -> Any:
    """Bring a value to an option's type and refuse what it does not allow.

    Args:
        option: The option that is set.
        value: What a caller, a terminal or a YAML file gave.

    Returns:
        The value as the config dataclass holds it.

    Raises:
        ConfigError: If the type, the choice or the range is wrong.
    """
    if value is None or (value == "" and option.default is None):
        if option.default is None:
            return None
        raise ConfigError(
            f"--{option.name} needs a value; leave it out for {option.default_in_words}"
        )
    if option.value_type == "list":
        words = value.split(",") if isinstance(value, str) else value
        if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"--{option.name} takes a list of names, got {value!r}")
        names = tuple(part for word in words for part in word.replace(",", " ").split())
        if words and not names:
            raise ConfigError(
                f"--{option.name} is empty; give names, or leave it out for "
                f"{option.default_in_words}"
            )
        return names
    if isinstance(value, str) and value in option.words:
        return value
    expected, words = _TYPES[option.value_type]
    # A bool is an int to Python, yet `seed: true` is a slip.
    if not isinstance(value, expected) or (option.value_type != "flag" and isinstance(value, bool)):
        words = " or ".join((words, *option.words))
        raise ConfigError(f"--{option.name} takes {words}, got {value!r}")
    if option.choices and value not in option.choices:
        hint = did_you_mean(value, option.choices)
        raise ConfigError(
            f"--{option.name} {value!r} is not one of {', '.join(option.choices)}{hint}"
        )
    return _in_range(option, value) if option.value_type in ("integer", "number") else value


def _in_range(option: Option, value: float) -> float:
    """The number, a float if the option's is one, once its size is checked."""
    is_whole = option.value_type == "integer"
    minimum, maximum = option.minimum, option.maximum
    if is_whole:
        minimum = -LARGEST_INTEGER if minimum is None else minimum
        maximum = LARGEST_INTEGER if maximum is None else maximum
    if minimum is not None and value < minimum:
        wrong = f"must be at least {minimum}"
    elif maximum is not None and value > maximum:
        wrong = f"must be at most {maximum}"
    elif not is_whole and not abs(value) <= sys.float_info.max:
        wrong = "takes a finite number"
    else:
        return value if is_whole else float(value)
    # Python writes no integer of more than 4300 digits.
    shown = value if isinstance(value, float) or value.bit_length() < 256 else "one far beyond"
    raise ConfigError(f"--{option.name} {wrong}, got {shown}")


def check_all(
    options: Iterable[Option], values: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """Check every value of a mapping, unknown names included.

    Args:
        options: The options that exist.
        values: Name to value.
        where: Where the values come from, for the message.

    Returns:
        Every value given, in its option's type; defaults aren't filled in.

    Raises:
        ConfigError: If a name is unknown or a value is wrong.
    """
    known = {each.name: each for each in options}
    for name in values:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"{where} sets an unknown option {name!r}{hint}")
    return {name: check(known[name], value) for name, value in values.items()}


def matching(flag: str, patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The modules that the globs of an option stand for, in the modules' order.

    Returns:
        Names that at least one glob matches, each once.

    Raises:
        ConfigError: If a pattern matches nothing, with near misses.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = did_you_mean(pattern, names) or f"; there is {names[0]}, for example"
            raise ConfigError(f"--{flag} {pattern!r} matches none of {len(names)} modules{hint}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def check_tables(config: Any) -> None:
    """Let every table of options that a config is made of check how its own go together.

    Args:
        config: A config dataclass; each of its bases may have a method `check_together`.

    Raises:
        ConfigError: The first clash found.
    """
    for table in reversed(type(config).__mro__):
        if check := vars(table).get("check_together"):
            check(config)


def plain_dict(config: Any) -> dict[str, Any]:
    """Every field of a config dataclass under its name, in plain YAML types."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }


def name_flags(text: str, names: Collection[str]) -> str:
    """Write `names` in backquotes as flags: "use `truncation`" becomes "use --truncation".

    The library knows arguments and no command line, so its messages quote their names.

    Args:
        text: A message.
        names: The options of the command that runs; other quoted words stay as they are.

    Returns:
        The message as a person at a terminal reads it.
    """
    return re.sub(r"`(\w+)`", lambda m: f"--{m[1]}" if m[1] in names else m[0], text)
