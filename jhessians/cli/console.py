"""What reaches standard error besides progress: one line per warning, one per failure."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import TextIO

from jhessians.cli.memory import (
    is_from_jax,
    is_out_of_memory,
    may_lack_memory,
    reached_limit,
)
from jhessians.config.option import name_flags
from jhessians.devices.watch import leave, loss
from jhessians.errors import ConfigError, UserError, printable
from jhessians.fitting.grace import Terminated

NOISY_LIBRARIES = (
    "absl", "datasets", "filelock", "flax", "fsspec", "httpx", "huggingface_hub", "jax",
    "jaxlib", "orbax", "transformers", "urllib3",
)  # fmt: skip

# Read when a library is imported, so they are set before; a user's own setting wins.
QUIET_ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

# XLA's messages run to thousands of characters.
LONGEST_DETAIL = 300

EXIT_INPUT = 1
EXIT_USAGE = 2
EXIT_FAULT = 70
EXIT_INTERRUPTED = 130


class _OneLineHandler(logging.Handler):
    """Writes `jhessians: warning: ...` to whatever standard error is at that moment.

    A live progress bar replaces `sys.stderr` while it is drawn; a stream that was kept from
    before would write through it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        print(f"jhessians: {level}: {one_line(record.getMessage())}", file=sys.stderr)


@contextmanager
def quiet_libraries(*, debug: bool, quiet: bool) -> Iterator[None]:
    """Turn warnings and logs into single lines, and keep the libraries' own chatter back.

    Everything is put back at the end.

    Args:
        debug: Let everything through, down to level INFO.
        quiet: Errors only.
    """
    root = logging.getLogger()
    handler = _OneLineHandler()
    root_level = root.level
    levels = {name: logging.getLogger(name).level for name in NOISY_LIBRARIES}
    environment = (
        {}
        if debug
        else {name: value for name, value in QUIET_ENVIRONMENT.items() if name not in os.environ}
    )
    with warnings.catch_warnings():
        root.addHandler(handler)
        root.setLevel(logging.ERROR if quiet else logging.INFO if debug else logging.WARNING)
        if not debug:
            os.environ.update(environment)
            for name in NOISY_LIBRARIES:
                logging.getLogger(name).setLevel(logging.ERROR)
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
        warnings.showwarning = _log_warning
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(root_level)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for name in environment:
                os.environ.pop(name, None)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    logging.getLogger("jhessians").warning("%s", message)


def one_line(text: str) -> str:
    """The text, safe to print, with every run of white space, line breaks included, as a space."""
    return printable(" ".join(text.split()))


@contextmanager
def errors_name_flags(names: Collection[str]) -> Iterator[None]:
    """Let every `UserError` from inside, and every error's notes, pass treated by `name_flags`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            error.args = (name_flags(str(error), names),)
        if notes := getattr(error, "__notes__", None):
            notes[:] = [name_flags(each, names) for each in notes]
        raise


def report_failure(error: BaseException) -> int:
    """Say in one line on standard error what went wrong.

    Returns:
        The exit code that goes with it.
    """
    message, code = _describe(error)
    leave()
    message = "; ".join([message, *getattr(error, "__notes__", [])])
    print(f"jhessians: error: {one_line(message)}", file=sys.stderr)
    return code


def _describe(error: BaseException) -> tuple[str, int]:
    for cause in _chain(error):  # an import that a signal ends raises what it likes
        if isinstance(cause, KeyboardInterrupt):
            return "interrupted", EXIT_INTERRUPTED
        if isinstance(cause, Terminated):
            return f"terminated by {cause}", cause.exit_code
    # Before all that memory's lack may look like, such as a file that can't be read.
    if any(is_out_of_memory(each) for each in _chain(error)):
        return "out of memory; try a smaller --token_batch_size, or --fsdp", EXIT_INPUT
    if any(may_lack_memory(each) for each in _chain(error)) and (limit := reached_limit()):
        return f"out of memory: ulimit -v allows {limit / 1e9:.1f} GB; allow more", EXIT_INPUT
    if isinstance(error, ConfigError):
        return str(error), EXIT_USAGE
    if isinstance(error, UserError):
        return str(error), EXIT_INPUT
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {cause.filename}" if cause.filename else ""
            return f"the disk is full{where}; free some space and run again", EXIT_INPUT
    if _is_loss_of_a_host(error):
        return loss(), EXIT_INPUT
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename or error}; choose another path", EXIT_INPUT
    if (reason := _no_devices(error)) is not None:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return (
            f"JAX finds no devices with JAX_PLATFORMS={platforms!r}{reason}; give cpu, or what is "
            "installed, or leave the variable out",
            EXIT_INPUT,
        )
    detail = shorten(f"{type(error).__name__}: {error}".removesuffix(": "), LONGEST_DETAIL)
    return (
        f"unexpected {detail} (run again with --debug for a traceback, and please report it)",
        EXIT_FAULT,
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _no_devices(error: BaseException) -> str | None:
    """Why JAX has no devices; None if it has, or that isn't what the error is about."""
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, RuntimeError | AssertionError):
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as again:
        reason = str(again).split(" (set JAX_PLATFORMS")[0].rstrip(".")
        return f": {reason}" if reason else ""
    return None


def _is_loss_of_a_host(error: BaseException) -> bool:
    # The words of the socket through which hosts talk.
    words = ("closed by peer", "reset by peer")
    text = str(error)
    return ("Gloo" in text or is_from_jax(error)) and any(each in text for each in words)
