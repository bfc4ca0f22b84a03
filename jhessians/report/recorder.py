"""Measuring a run while it goes on, for `--profile` and `--profile_trace`.

A `Recorder` stands around every stage of the run's `Progress`. The arithmetic that a stage needed
is counted, not measured, and the peak to compare with is measured on the run's own devices.
"""

import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jhessians.capture.problem import Problem
from jhessians.capture.sites import find_sites
from jhessians.data.batches import Batches
from jhessians.devices.precision import multiplying
from jhessians.fitting import arithmetic
from jhessians.interop.layout import DTYPES
from jhessians.interop.rundir import output_error
from jhessians.methods.method import Method, Run
from jhessians.report.profile import PROFILE_FILE, Profile, StageProfile

COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration",
             "/jax/core/compile/backend_compile_duration")  # fmt: skip


@dataclass
class Recorder:
    """What each stage takes, by name; a name used twice adds up.

    Attributes:
        folder: Where the run writes.
        stages: So far, without their arithmetic.
    """

    folder: Path
    stages: dict[str, StageProfile]
    _compile_seconds: float = 0.0

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Measure one stage."""
        compiled, written, start = self._compile_seconds, _size(self.folder), time.perf_counter()
        _forget_peak_memory()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            before = self.stages.pop(name, StageProfile(name, 0.0, 0.0, None, 0, 0))
            self.stages[name] = replace(
                before,
                seconds=before.seconds + time.perf_counter() - start,
                compile_seconds=before.compile_seconds + self._compile_seconds - compiled,
                written_bytes=before.written_bytes + _size(self.folder) - written,
                memory_bytes=max(before.memory_bytes, _peak_memory()),
                device_bytes=_device_memory(),
            )

    def listen(self, event: str, duration_secs: float, **details: str | int) -> None:
        """What JAX reports of its compilations; those of other threads take none of a stage."""
        if event in COMPILING and threading.current_thread() is threading.main_thread():
            self._compile_seconds += duration_secs

    def finish(
        self,
        flop: Mapping[str, float],
        batches: Batches,
        mesh: Mesh,
        *,
        numbers: str,
        matmul_precision: str,
    ) -> Profile:
        """The whole profile, written beside the results by the first process.

        Args:
            flop: What stages needed, by name, as far as it is known.
            batches: What the run went through.
            mesh: The devices.
            numbers: Number format of the model, such as "fp32".
            matmul_precision: How its products were computed.

        Returns:
            Seconds and FLOP of every stage, beside the device's own peak.
        """
        documents = batches.documents
        peak = product_peak(mesh, DTYPES[numbers][1], matmul_precision=matmul_precision)
        profile = Profile(
            [replace(each, flop=flop.get(name)) for name, each in self.stages.items()],
            peak=peak * jax.process_count(),
            numbers=numbers,
            matmul_precision=matmul_precision,
            devices=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            tokens=int(documents.lengths[documents.lengths >= 2].sum()),
            padding_share=batches.plan.padding_share,
        )
        if jax.process_index() == 0:
            text = json.dumps(profile.document(), indent=1) + "\n"
            (self.folder / PROFILE_FILE).write_text(text, encoding="utf-8")
        return profile


class NoRecorder(Recorder):
    """Records nothing."""

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Do nothing around a stage."""
        yield


@contextmanager
def recording(folder: Path, *, profile: bool, trace: str | None) -> Iterator[Recorder]:
    """A recorder of stages, while a trace is written if that is wanted.

    Args:
        folder: Where the run writes.
        profile: Whether stages are to be measured.
        trace: The trace's folder; None for no trace.

    Yields:
        The recorder; it stops listening when the block is left.

    Raises:
        OutputError: If the trace can't be written.
    """
    if not profile and trace is None:
        yield NoRecorder(folder, {})
        return
    with ExitStack() as stack:
        if trace is not None and jax.process_index() == 0:
            stack.enter_context(_traced(Path(trace)))
        recorder = Recorder(folder, {})
        jax.monitoring.register_event_duration_secs_listener(recorder.listen)
        stack.callback(jax.monitoring.unregister_event_duration_listener, recorder.listen)
        yield recorder


@contextmanager
def _traced(folder: Path) -> Iterator[None]:
    """XProf's files below `folder`, and Perfetto's beside them."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of Python's would drown the rest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".jhessians"  # JAX would only log that it can't write
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise output_error(error, folder) from error
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def needed(run: Run, method: Method) -> dict[str, float]:
    """FLOP that a fit's passes needed, by stage."""
    work, passes = gone_through(run.problem, next(iter(run.batches)))(run.batches.documents.lengths)
    return {stage: passes + flop for stage, flop in method.flop(work, run.options).items()}


def gone_through(
    problem: Problem, batch: Any
) -> Callable[[np.ndarray], tuple[arithmetic.Work, float]]:
    """What passes go through.

    Args:
        problem: Loss, model and linears.
        batch: Any of its batches.

    Returns:
        Lengths of documents → the recorded linears' work, and the FLOP of going through the model.
    """
    model: Any = problem.model
    everything = find_sites(problem.loss, model, batch).values()
    experts = model.config.experts
    share = experts.chosen / experts.count if experts else 1.0
    readers = {each.name: share for each in everything if each.routed}
    head = math.prod((model.embedding if model.head is None else model.head).shape)
    weights = arithmetic.multiplied_weights(everything, head, readers)

    def of_lengths(lengths: np.ndarray) -> tuple[arithmetic.Work, float]:
        counted, draws = arithmetic.count_lengths(lengths.tolist()), problem.draws
        work = arithmetic.Work(list(problem.sites.values()), counted, draws, readers)
        return work, arithmetic.passes(weights, counted, draws=draws)

    return of_lengths


def product_peak(
    mesh: Mesh,
    dtype: np.dtype,
    *,
    matmul_precision: str,
    seconds: float = 1.5,
    largest: int = 8192,
) -> float:
    """FLOP per second of matrix products on all of this host's devices at once, the best seen.

    Args:
        mesh: The devices of all hosts.
        dtype: Of the matrices.
        matmul_precision: How float32 numbers are multiplied.
        seconds: About how long to try: products grow until they fill it.
        largest: Rows of the largest matrices.

    Returns:
        A peak to compare a stage's FLOP per second with.
    """
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    mesh = Mesh(np.array(devices), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, P("device"))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("device"), out_specs=P("device"))
    def multiply(x):
        return (x[0] @ x[0])[None]

    end, size, best = time.perf_counter() + seconds, 512, 0.0
    while True:
        x = jax.random.normal(jax.random.key(0), (len(devices), size, size), dtype)
        x = jax.device_put(x, sharding)  # no constants: they would not heat a chip
        with multiplying(matmul_precision, mesh):
            multiply(x).block_until_ready()
            fastest = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                multiply(x).block_until_ready()
                fastest = min(fastest, time.perf_counter() - start)
        best = max(best, 2 * size**3 * len(devices) / fastest)
        left = end - time.perf_counter()
        if left < 4 * fastest:
            return best
        if size < largest and left > 4 * 8 * fastest:
            size *= 2


def _size(folder: Path) -> int:
    """Bytes of a folder's files, hard links counted once."""
    files: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a file that is just being renamed
                status = os.stat(os.path.join(place, name))
                files[status.st_dev, status.st_ino] = status.st_size
    return sum(files.values())


def _forget_peak_memory() -> None:
    """Let the peak count from here on, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """The largest resident size since then, or else since the start, in bytes."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _device_memory() -> int | None:
    """The largest of a device's memory in use so far."""
    peaks = [(each.memory_stats() or {}).get("peak_bytes_in_use") for each in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)
