"""Options that a command takes over from an earlier run unless they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jhessians.config.option import options_of


def inherited(name: str, tables: Iterable[type], names: Iterable[str], *, source: str) -> type:
    """A table of other tables' options whose default is what an earlier run had.

    Args:
        name: Of the new dataclass.
        tables: Dataclasses that have the options.
        names: Which of their options.
        source: The earlier run, for `--help`.

    Returns:
        A frozen dataclass, all of whose fields are None by default.
    """
    known = {each.name: each for table in tables for each in dataclasses.fields(table)}
    fields = []
    for wanted in names:
        metadata = {
            **known[wanted].metadata, "bergson": "", "default_text": f"as in {source}",
        }  # fmt: skip
        fields.append((wanted, Any, dataclasses.field(default=None, metadata=metadata)))
    return dataclasses.make_dataclass(name, fields, frozen=True)


def prefixed(
    name: str, table: type, names: Iterable[str], *, prefix: str, group: str, what: str
) -> type:
    """A table of another table's options under longer names.

    Args:
        name: Of the new dataclass.
        table: A dataclass that has the options.
        names: Which of its options.
        prefix: What the new names begin with.
        group: Heading in `--help`.
        what: Whose options they are, for `--help`.

    Returns:
        A frozen dataclass with the same defaults.
    """
    known = {each.name: each for each in dataclasses.fields(table)}
    fields = []
    for wanted in names:
        metadata = {**known[wanted].metadata, "group": group, "bergson": ""}
        metadata["help"] = f"{what}: {metadata['help'][0].lower()}{metadata['help'][1:]}"
        field = dataclasses.field(default=known[wanted].default, metadata=metadata)
        fields.append((prefix + wanted, Any, field))
    return dataclasses.make_dataclass(name, fields, frozen=True)


def some_of(name: str, table: type, names: Iterable[str]) -> type:
    """A table of some of another table's options, as they are.

    Args:
        name: Of the new dataclass.
        table: A dataclass that has the options.
        names: Which of its options.

    Returns:
        A frozen dataclass with the same defaults.
    """
    known = {each.name: each for each in dataclasses.fields(table)}
    fields = [
        (each, Any, dataclasses.field(default=known[each].default, metadata=known[each].metadata))
        for each in names
    ]
    return dataclasses.make_dataclass(name, fields, frozen=True)


def given(config: Any, names: Iterable[str]) -> Mapping[str, Any]:
    """The values of those options that are not left to the earlier run."""
    chosen = {name: getattr(config, name) for name in names}
    return {name: value for name, value in chosen.items() if value is not None}


def names_of(*tables: type) -> tuple[str, ...]:
    """The names of all options of some tables."""
    return tuple(each.name for table in tables for each in options_of(table))
