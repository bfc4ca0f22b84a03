"""Runs that are killed at any moment, and go on.

A server process has imported everything and forks a child for each run: imports take longer than
the small runs here. A run is killed after some seconds, or when it is about to make its n-th change
in its folder: a rename, a new folder, a file opened for writing or deleted.
"""

import json
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

PRELOADED = [
    "tests.chaos.harness", "jhessians.commands.compute.pipeline", "jhessians.methods.table",
    "jhessians.commands.score.pipeline", "jhessians.fitting.fit", "orbax.checkpoint",
    "transformers.models.auto.tokenization_auto", "datasets",
]  # fmt: skip
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate"}


@dataclass(frozen=True)
class Run:
    """What became of a run.

    Attributes:
        code: Exit code; minus the signal's number if one killed it.
        changes: How many changes it made in its folder.
        output: What it printed.
    """

    code: int
    changes: int
    output: str


def server():
    """The context whose processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run(
    context,
    arguments: list[str],
    folder: Path,
    *,
    seconds: float | None = None,
    change: int | None = None,
    environment: dict[str, str] | None = None,
) -> Run:
    """A run of the command line, to its end or until it is killed.

    Args:
        context: From `server`.
        arguments: Of the command line.
        folder: Changes in it are counted.
        seconds: After so many it is killed.
        change: Instead of the change of this number it kills itself.
        environment: Further variables.

    Returns:
        What became of it.
    """
    log = folder / "log"
    child = start(context, arguments, folder, log, change=change, environment=environment)
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
    return result(child, log)


def start(context, arguments, folder, log, *, change=None, environment=None):
    """A run that has just begun; `result` says what became of it."""
    child = context.Process(
        target=_run, args=(arguments, folder, log, change, {**os.environ, **(environment or {})})
    )
    child.start()
    return child


def result(child, log) -> Run:
    """What became of a run that has ended."""
    text = log.read_text(errors="replace") if log.exists() else ""
    counts = log.with_suffix(".changes")
    return Run(child.exitcode, int(counts.read_text() or 0) if counts.exists() else 0, text)


def _run(arguments, folder, log, change, environment):
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM
                      else signal.default_int_handler)  # fmt: skip
    counts = log.with_suffix(".changes")
    counts.write_text("0")
    handle, made, root = os.open(counts, os.O_WRONLY), 0, f"{folder}/run"

    def count(event, details):
        nonlocal made
        changes = event in CHANGES or (
            event == "open" and isinstance(details[1], str) and set(details[1]) & set("wxa+")
        )
        if not changes or not str(details[0]).startswith(root):
            return
        if change is not None and made == change:
            os.kill(os.getpid(), signal.SIGKILL)
        made += 1
        os.pwrite(handle, str(made).encode(), 0)

    sys.addaudithook(count)
    sys.argv = ["jhessians", *arguments]
    from jhessians.__main__ import run as command_line

    command_line()


def contents(folder: Path) -> dict[str, object]:
    """All numbers of a result, byte for byte, by file; without what says when and by whom."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in ("manifest.json", "config.yaml", "config.json"):
            continue
        data = path.read_bytes()
        if path.suffix == ".safetensors":  # its metadata names the run
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            header.pop("__metadata__", None)
            found[str(path.relative_to(folder))] = (header, data[8 + size :])
        else:
            found[str(path.relative_to(folder))] = data
    return found
