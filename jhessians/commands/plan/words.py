"""A plan as text and as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from jhessians.config.units import bytes_in_words, count_in_words, seconds_in_words
from jhessians.planning.plan import SHARE_OF_PEAK, Plan, Stage
from jhessians.report.summary import WIDTH
from jhessians.version import __version__

_COLUMNS = (("", 22), ("device", 10), ("host", 10), ("FLOP", 9), ("sent", 10), ("time", 12))


def render(model: str, plan: Plan, compiled: Mapping[str, int], advice: Sequence[str]) -> str:
    """What the terminal shows.

    Args:
        model: Its name.
        plan: The fit.
        compiled: Stage → bytes of a device, as the compiler says.
        advice: Sentences.

    Returns:
        Lines of at most 80 columns, but for long names.
    """
    device = plan.machines.device
    host = f", {bytes_in_words(device.host_memory)} a host" if device.host_memory else ""
    lines = [
        f"{model}: {plan.parameters:,} parameters, {count_in_words(plan.tokens, 'token')}",
        f"  on {plan.machines}, {count_in_words(plan.machines.hosts, 'host')}{host}",
        f"  {plan.token_batch_size} tokens a device and step, "
        f"{count_in_words(plan.steps, 'step')} a pass, activations: {plan.activations}"
        + (f", {plan.partitions} groups of modules" if plan.partitions > 1 else ""),
        "",
        _row([title for title, _ in _COLUMNS]),
        *(_row(_cells(stage)) for stage in plan.stages),
        "",
    ]
    fullest = max(plan.stages, key=lambda stage: stage.device_bytes)
    parts = ", ".join(f"{name} {bytes_in_words(size)}" for name, size in fullest.parts.items())
    share = plan.peak / plan.budget
    lines += wrap(
        f"{'Fits' if plan.fits else 'Does not fit'}: at most {bytes_in_words(plan.peak)} of the "
        f"{bytes_in_words(plan.budget)} that a program gets of a device ({share:.0%}), in "
        f"{fullest.name.lower()} ({parts})",
        WIDTH, initial_indent="  ", subsequent_indent="  ",
    )  # fmt: skip
    for name, size in compiled.items():
        lines.append(f"  XLA's compiler, {name.lower()}: {bytes_in_words(size)} a device")
    if plan.seconds:
        lines += wrap(
            f"Time: about {seconds_in_words(plan.seconds)}, if products reach {SHARE_OF_PEAK:.0%} "
            "of the peak and traffic goes on beside them; behind each time is what bounds it",
            WIDTH, initial_indent="  ", subsequent_indent="  ",
        )  # fmt: skip
    lines.append(f"  Disk: {bytes_in_words(plan.disk)}")
    for sentence in advice:
        lines += wrap(sentence, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(line.rstrip() for line in lines)


def document(
    model: str, plan: Plan, compiled: Mapping[str, int], advice: Sequence[str]
) -> dict[str, Any]:
    """All numbers in plain types; arguments are those of `render`.

    Returns:
        Nested tables: bytes, FLOP and seconds.
    """
    stages = [
        asdict(stage)
        | {"time": stage.time, "bound": stage.bound, "compiled": compiled.get(stage.name)}
        for stage in plan.stages
    ]
    machines = {
        "devices": plan.machines.count, "device": asdict(plan.machines.device),
        "axes": dict(plan.machines.axes), "topology": plan.machines.topology,
        "hosts": plan.machines.hosts,
    }  # fmt: skip
    return {
        "jhessians_version": __version__, "model": model, **asdict(plan),
        "machines": machines, "stages": stages, "peak": plan.peak, "fits": plan.fits,
        "seconds": plan.seconds, "advice": list(advice),
    }  # fmt: skip


def _cells(stage: Stage) -> list[str]:
    time = f"{seconds_in_words(stage.time)}" if stage.seconds else "-"
    return [
        stage.name,
        bytes_in_words(stage.device_bytes),
        bytes_in_words(stage.host_bytes) if stage.host_bytes else "-",
        f"{stage.flop:.1e}" if stage.flop else "-",
        bytes_in_words(round(stage.sent)) if stage.sent else "-",
        time,
        stage.bound if stage.seconds else "",
    ]


def _row(cells: Sequence[str]) -> str:
    first, *rest = cells
    widths = [width for _, width in _COLUMNS][1:]
    line = f"  {first:<22}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(rest, widths, strict=False)
    )
    return line + (f"  {rest[-1]}" if len(rest) > len(widths) else "")
