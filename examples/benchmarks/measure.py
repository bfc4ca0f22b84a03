"""Running one whole process: seconds, seconds per stage, peak memory; and reading what it wrote."""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COVARIANCES = "covariances"
EIGEN = "eigendecompositions"
CORRECTION = "correction"
REST = "rest"
"""Start-up, loading, writing, compiling ahead, and whatever a tool has no stage for."""

STAGES = (COVARIANCES, EIGEN, CORRECTION)


@dataclass(frozen=True)
class Tool:
    """One contestant.

    Attributes:
        name: As shown.
        command: The whole command line; `{out}` stands for the folder to write.
        environment: Beside the benchmark's own.
        stages: Stage → patterns of the lines that begin and end it; an empty line stands for the
            start of the process.
        factors: Factor → folder or file with its tensors, below the folder written.
        prefix: What its module names begin with, before the names that the others use.
        sums_documents: Whether its Λ is a sum over documents rather than their mean.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    stages: Mapping[str, tuple[str, str]]
    factors: Mapping[str, str]
    prefix: str = ""
    sums_documents: bool = False


@dataclass(frozen=True)
class Run:
    """What one process took.

    Attributes:
        tool: Its name.
        seconds: From start to end, imports and compilation included.
        stages: Seconds of each stage, `REST` included, as the tool's output tells.
        peak_bytes: Largest resident memory of the process, or of a child of it if larger.
        cpu_seconds: Over all cores.
        load_before: Other processes that wanted to run, averaged over the minute before.
    """

    tool: str
    seconds: float
    stages: dict[str, float]
    peak_bytes: int
    cpu_seconds: float
    load_before: float


class RunFailed(RuntimeError):
    """A contestant ended with an error; the message holds the end of its output."""


def measure(tool: Tool, out: Path, cache: Path) -> Run:
    """Run a tool to its end.

    Args:
        tool: What to run.
        out: Folder that it writes.
        cache: An empty folder for the data set's conversion, which every run pays for.

    Raises:
        RunFailed: If the process ends with an error.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(cache),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        # Compilation counts: a fit of a new model pays for it.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONUNBUFFERED": "1",
        **tool.environment,
    }
    load = os.getloadavg()[0]
    start = time.perf_counter()
    process = subprocess.Popen(
        [word.format(out=out) for word in tool.command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip
    try:
        lines = _timed_lines(process, start)
        # Not `wait`: this gives the memory of this child alone.
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(line for _, line in lines[-25:])
        raise RunFailed(f"{tool.name} ended with {process.returncode}; its last lines:\n{tail}")
    stages = stage_seconds([(0.0, ""), *lines], tool.stages)
    stages[REST] = seconds - sum(stages.values())
    return Run(
        tool.name, seconds, stages, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, load
    )


def _timed_lines(process: subprocess.Popen, start: float) -> list[tuple[float, str]]:
    """(Seconds, line) of all output; a progress bar's every state is a line."""
    assert process.stdout is not None
    descriptor, lines, rest = process.stdout.fileno(), [], b""
    while block := os.read(descriptor, 1 << 16):
        now = time.perf_counter() - start
        *whole, rest = re.split(rb"[\r\n]+", rest + block)
        # A bar that stands still has no line end yet, and its first state begins a stage.
        lines += [(now, line.decode(errors="replace")) for line in (*whole, rest) if line.strip()]
    return lines


def stage_seconds(
    lines: Sequence[tuple[float, str]], patterns: Mapping[str, tuple[str, str]]
) -> dict[str, float]:
    """Seconds between the lines that begin and end each stage; a stage may come several times."""
    seconds = dict.fromkeys(patterns, 0.0)
    running, since = "", 0.0
    for moment, line in lines:
        if running and re.search(patterns[running][1], line):
            seconds[running] += moment - since
            running = ""
        elif not running:
            for name, (begin, _) in patterns.items():
                if re.search(begin, line):
                    running, since = name, moment
                    break
    return seconds


def read_factor(tool: Tool, out: Path, factor: str) -> dict:
    """Module → numpy array of one factor, put together from its shards."""
    import numpy as np
    from safetensors.numpy import load_file

    place = out / tool.factors[factor]
    count = len(list(place.iterdir())) if place.is_dir() else 1
    files = [place / f"shard_{i}.safetensors" for i in range(count)] if place.is_dir() else [place]
    shards = [load_file(file) for file in files]
    return {
        name.removeprefix(tool.prefix): np.concatenate([shard[name] for shard in shards])
        for name in shards[0]
    }


def disagreement(
    tools: tuple[Tool, Tool], outs: tuple[Path, Path], documents: int
) -> dict[str, float]:
    """The largest relative difference over all modules, for A, S and the sum of Λ.

    A matrix's is the largest absolute difference over the largest absolute entry.

    Raises:
        RunFailed: If the two have factors of different modules.
    """
    import numpy as np

    worst = {}
    for factor in ("A", "S", "sum of Λ"):
        values = []
        for tool, out in zip(tools, outs, strict=True):
            found = {name: np.float64(x) for name, x in read_factor(tool, out, factor).items()}
            if factor == "sum of Λ":
                share = documents if tool.sums_documents else 1
                found = {name: x.sum() / share for name, x in found.items()}
            values.append(found)
        first, second = values
        if set(first) != set(second):
            odd = min(set(first) ^ set(second))
            raise RunFailed(f"{tools[0].name} and {tools[1].name} differ in modules, as in {odd}")
        worst[factor] = max(
            float(np.abs(first[name] - y).max() / np.abs(y).max()) for name, y in second.items()
        )
    return worst
