"""Options of where a run computes, and what it writes and prints; no JAX is imported."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from jhessians.config.option import name_flags, option
from jhessians.devices.axes import parse_axes
from jhessians.errors import ConfigError, MeshError
from jhessians.interop.layout import Layout

MACHINE = "machine"
OUTPUT = "output"

SPARE_FILES = 64
"""Beside the shards: libraries, sockets, the model's own files."""


@dataclass(frozen=True)
class DeviceOptions:
    """On which devices a run computes, and how much at once."""

    token_batch_size: int = option(
        2048,
        "Tokens that one device takes in one step, padding included; lower it when memory "
        "runs out.",
        group=MACHINE,
        metavar="TOKENS",
        unit="tokens",
        minimum=2,
        default_text="2048 tokens per device",
        bergson="index_cfg.token_batch_size",
    )
    world_size: int | None = option(
        None,
        "Devices to use.",
        group=MACHINE,
        value_type="integer",
        metavar="N",
        unit="devices",
        minimum=1,
        default_text="all devices",
    )
    mesh: str | None = option(
        None,
        "How the devices are arranged, for those who know better: sizes of axes such as 4x2, whose "
        "product is their number; or, for weights that are spread, such as data=4,fsdp=2, which "
        "spreads them over fsdp and copies them along data (data=4x4,fsdp=4x2 gives each several "
        "axes). Axes of 8 or more make TPUs sum every factor whole.",
        group=MACHINE,
        metavar="AXES",
        default_text="short axes that follow the devices' wiring",
    )
    fsdp: bool = option(
        False,
        "Spread the model's weights over the devices instead of copying them to each.",
        group=MACHINE,
        bergson="index_cfg.fsdp",
    )

    activations: str = option(
        "auto",
        "For the backward pass, store every layer's matrix products (faster) or recompute a layer "
        "from its input (leaner; known as activation checkpointing or rematerialization). auto: "
        "store if that takes at most half of the memory that model and factors leave free.",
        group=MACHINE,
        choices=("auto", "store", "recompute"),
    )

    def check_together(self) -> None:
        """Refuse a mesh that can't be read, or that says otherwise than `fsdp`.

        Raises:
            ConfigError: With one line.
        """
        if self.mesh is None:
            return
        try:
            names = list(parse_axes(self.mesh))
        except MeshError as error:
            raise ConfigError(name_flags(str(error), ["mesh"])) from None
        spreads = any(name.startswith("fsdp") for name in names)
        if spreads and not self.fsdp:
            raise ConfigError(f"--mesh {self.mesh} spreads the weights; add --fsdp")
        if self.fsdp and not spreads and names[0].startswith("data"):
            raise ConfigError(
                f"--fsdp spreads the weights, but --mesh {self.mesh} copies them along all axes; "
                "name an axis fsdp, or leave one of them out"
            )


@dataclass(frozen=True)
class MachineOptions(DeviceOptions):
    """Where a fit computes."""

    offload: str = option(
        "none",
        "weights: leave the layers' weights in host memory, from where the devices fetch one layer "
        "at a time, so that the factors have the devices' memory to themselves.",
        group=MACHINE,
        choices=("none", "weights"),
    )
    module_partitions: int | Literal["auto"] = option(
        1,
        "Fit the modules in so many groups, one after the other, each with passes of its own: "
        "fewer factors are in memory at a time. auto: as few groups as memory needs.",
        group=MACHINE,
        metavar="N",
        minimum=1,
        words=("auto",),
        default_text="1, all at once",
        bergson="hessian_cfg.module_partitions",
    )


@dataclass(frozen=True)
class HostOptions:
    """How long the hosts of a run wait for each other."""

    timeout_minutes: float = option(
        10.0,
        "With several hosts: when nothing has moved on any of them for so long, end all, and say "
        "which one is missing, and where; compiling and reading files are moves. 0 turns that off.",
        group=MACHINE,
        metavar="MINUTES",
        unit="minutes",
        minimum=0,
        maximum=1e6,
    )
    join_minutes: float = option(
        3.0,
        "With several hosts: how long the first waits for the others, and they for it, at the "
        "start.",
        group=MACHINE,
        metavar="MINUTES",
        unit="minutes",
        minimum=0.01,
        maximum=1e6,
    )


@dataclass(frozen=True)
class OutputOptions:
    """What a fit writes."""

    num_shards: int | None = option(
        None,
        "Files per factor on disk; bergson reads shards in as many processes.",
        group=OUTPUT,
        value_type="integer",
        metavar="N",
        unit="files",
        minimum=1,
        default_text="the world size",
    )
    layout: Layout = option(
        "both",
        "File trees to write: bergson 2.5.1's, the older one with a folder influence_results, or "
        "both with shared files.",
        group=OUTPUT,
        choices=("both", "bergson", "influence_results"),
    )

    def check_together(self) -> None:
        """Refuse more shards than files can be open.

        Raises:
            ConfigError: If a factor's files, which are written side by side, are too many.
        """
        most = _open_files() - SPARE_FILES
        if self.num_shards is not None and self.num_shards > most:
            raise ConfigError(
                f"--num_shards {self.num_shards} needs as many open files, and the system allows "
                f"this process {most} (ulimit -n); give fewer"
            )


@dataclass(frozen=True)
class ProfileOptions:
    """What a run says of its time and memory."""

    profile: bool = option(
        False,
        "After the summary, print each stage's seconds, arithmetic, share of the machine's peak "
        "and memory, and write them to profile.json.",
        group=OUTPUT,
    )
    profile_trace: str | None = option(
        None,
        "Write a trace of the run for XProf and Perfetto to this folder; take few tokens, since "
        "traces grow fast.",
        group=OUTPUT,
        metavar="DIR",
        default_text="none",
    )


@dataclass(frozen=True)
class SavingOptions:
    """How a run survives its end."""

    resume: bool = option(
        False,
        "Go on with what an unfinished run into the same folder has saved, and begin anew if there "
        "is nothing. The result is the same, bit for bit, as that of a run that was never ended.",
        group=OUTPUT,
    )
    checkpoint_minutes: float = option(
        10.0,
        "Save the run's state so often, and when a stage ends that took more than a fiftieth of "
        "it; 0 turns that off.",
        group=OUTPUT,
        metavar="MINUTES",
        unit="minutes",
        minimum=0,
        maximum=1e6,
    )
    grace_seconds: float = option(
        25.0,
        "After SIGTERM, the notice of a preemption, end within this time, the state saved.",
        group=OUTPUT,
        metavar="SECONDS",
        unit="seconds",
        minimum=0,
        maximum=1e6,
    )


@dataclass(frozen=True)
class ConsoleOptions:
    """What every command asks: may it replace its output, and how much does it say."""

    overwrite: bool = option(
        False,
        "Replace the output folder if it is an earlier result, once the new one is complete.",
        group=OUTPUT,
        bergson="index_cfg.overwrite",
    )
    quiet: bool = option(
        False,
        "Print nothing but errors.",
        group=OUTPUT,
    )
    debug: bool = option(
        False,
        "Show the libraries' own messages, and a traceback with every error.",
        group=OUTPUT,
        bergson="index_cfg.debug",
    )


def _open_files() -> int:
    """How many files a process may have open."""
    try:
        import resource
    except ImportError:  # Windows, whose C library has 8192
        return 8192
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
