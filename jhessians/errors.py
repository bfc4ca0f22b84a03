"""Errors that a user can cause and mend.

Every message is one line: what was given, what was expected, what to do. The command line
prints it and exits non-zero; a library caller catches `UserError` or one of its kinds.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 120, 120


class UserError(Exception):
    """Base of every error whose cause lies in the input, not in jhessians."""


class ConfigError(UserError):
    """An option, or a combination of options, that makes no sense."""


class CheckpointError(UserError):
    """A model folder or file that can't be read as the model it claims to be."""


class DatasetError(UserError):
    """A data set that can't be read, or that holds nothing to compute on."""


class MeshError(UserError):
    """Devices that were asked for and do not exist."""


class NumericsError(UserError):
    """NaN or infinity where a finite number is needed; the message names the module."""


class FoldError(UserError):
    """A fold whose statistics, terms or operands don't fit one another; the message names them."""


class OutputError(UserError):
    """A result that can't be written: it exists already, the disk is full, no permission."""


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """`; did you mean ...?` for a near miss, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(prefix + each for each in close)}?" if close else ""


def quoted(value: object) -> str:
    """A value from a file in a message, as Python writes it, but the inside of what is long."""
    try:
        return shown(_BRIEF.repr(value))
    except ValueError:
        return "a number of thousands of digits"


def shown(text: str, *, limit: int = 200) -> str:
    """Words from a file in a message: short, on one line, and without control characters."""
    text = printable(text.replace("\n", "\\n"))
    return text if len(text) <= limit else f"{text[:limit]}…"


_CONTROLS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f"  # of terminals, but for the line feed
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # of lines, and of the direction of writing
    "\ud800-\udfff]"  # bytes of a file's name that are no UTF-8
)


def printable(text: str) -> str:
    """The text with every character that commands a terminal written as in Python.

    Names of files, tensors and columns, and texts of documents, are other people's.

    Args:
        text: May have several lines.

    Returns:
        The same lines, safe to print.
    """
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)
