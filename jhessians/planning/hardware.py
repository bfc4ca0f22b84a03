"""What there is to rent: devices, their memory, speed and links, and how many a host has.

Every figure is the maker's own, a peak: TPUs from the pages of Google Cloud's documentation on
each version ("System architecture", 2025), GPUs from NVIDIA's data sheets, without sparsity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jhessians.config.units import bytes_in_words
from jhessians.devices.precision import HIGHEST, MATMUL_PRECISIONS
from jhessians.errors import ConfigError, did_you_mean

GIB = 1 << 30
GB = 10**9
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: As it is typed.
        memory: Bytes that a program may use, at most.
        flop: Number format → FLOP a second of products of such numbers, `bf16`, `tf32`, `fp32` or
            `fp64`; formats that matrix units lack are missing.
        bandwidth: Bytes a second between the device and its memory.
        link: Bytes a second that a device sends to the others of its slice or host, over all of
            its links.
        per_host: How many devices a host has.
        network: Bytes a second that a device sends to other hosts; 0 if the links reach them.
        host_memory: Bytes of a host.
        cores: Of a host, which eigendecompose.
        platform: JAX's name of it.
    """

    name: str
    memory: int
    flop: Mapping[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    link: float = 0.0
    per_host: int = 8
    network: float = 0.0
    host_memory: int = 0
    cores: int = 0
    platform: str = "cuda"

    def speed(self, numbers: str, matmul_precision: str) -> float:
        """FLOP a second of products, the fastest way that gives the precision.

        Args:
            numbers: Format of the numbers, such as "fp32".
            matmul_precision: How float32 numbers are multiplied.

        Returns:
            FLOP a second; 0 where it isn't known.
        """
        short = self.flop.get("bf16", 0.0)
        if numbers in ("bf16", "fp16"):
            return short
        if numbers == "fp64":
            return self.flop.get("fp64", 0.0)
        if matmul_precision == HIGHEST:  # on a TPU, six products of short numbers
            return self.flop.get("fp32") or short / 6
        products = MATMUL_PRECISIONS[matmul_precision].products
        parts = "tf32" if matmul_precision.startswith("tf32") else "bf16"
        return self.flop.get(parts, 0.0) / products


def _tpu(
    name: str, memory: int, bf16: float, bandwidth: int, link: int, host: int, cores: int
) -> Device:
    return Device(
        name, memory * GIB, {"bf16": bf16 * TERA}, bandwidth * 1e9, link * 1e9, 4,
        host_memory=host * GIB, cores=cores, platform="tpu",
    )  # fmt: skip


def _gpu(
    name: str,
    memory: int,
    bf16: float,
    tf32: float,
    fp32: float,
    fp64: float,
    bandwidth: int,
    link: int,
    network: float = 50e9,
) -> Device:
    speeds = {"bf16": bf16, "tf32": tf32, "fp32": fp32, "fp64": fp64}
    return Device(
        name, memory * GB, {key: value * TERA for key, value in speeds.items()}, bandwidth * 1e9,
        link * 1e9, 8, network, host_memory=1024 * GIB, cores=96,
    )  # fmt: skip


# Memory in GiB (TPU) or GB (GPU); TFLOP/s; GB/s of memory; GB/s that a device sends over its links;
# of TPUs the GiB and the cores (half of the virtual ones) of a host with four chips.
DEVICES = {
    each.name: each
    for each in (
        _tpu("v4", 32, 275, 1228, 300, 407, 120),
        _tpu("v5e", 16, 197, 819, 200, 192, 56),
        _tpu("v5p", 95, 459, 2765, 600, 448, 104),
        _tpu("v6e", 32, 918, 1640, 400, 720, 90),
        _gpu("A100", 80, 312, 156, 19.5, 19.5, 2039, 300, 25e9),
        _gpu("A100-40GB", 40, 312, 156, 19.5, 19.5, 1555, 300, 25e9),
        _gpu("H100", 80, 989, 495, 67, 67, 3350, 450),
        _gpu("H200", 141, 989, 495, 67, 67, 4800, 450),
        _gpu("B200", 180, 2250, 1125, 75, 37, 7700, 900),
        _gpu("L4", 24, 121, 60, 30.3, 0.5, 300, 32, 12.5e9),
        _gpu("L40S", 48, 362, 183, 91.6, 1.4, 864, 32, 25e9),
        _gpu("RTX4090", 24, 165, 82.6, 82.6, 1.3, 1008, 32, 1.25e9),
    )
}

SHARE_OF_MEMORY = 0.92
"""Of a device's memory, what programs get: the rest is the runtime's and lost between buffers."""


_TOPOLOGY = re.compile(r"(?P<kind>v\d\w?):(?P<sizes>\d+(x\d+){1,2})")
_DEVICES = re.compile(r"(?P<count>\d+)x(?P<kind>[\w.-]+)", re.IGNORECASE)
_MEMORY = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>GB|GiB)", re.IGNORECASE)


def parse_topology(text: str) -> tuple[Device, tuple[int, ...]]:
    """A slice of TPUs, such as `v5p:4x4x4`.

    Returns:
        A chip, and how many there are along each side.

    Raises:
        ConfigError: If there is no such topology.
    """
    found = _TOPOLOGY.fullmatch(text)
    kinds = [each.name for each in DEVICES.values() if each.platform == "tpu"]
    if found is None or found["kind"] not in kinds:
        raise ConfigError(
            f"`topology` {text!r} is none that is known; give one of {', '.join(kinds)} and its "
            "sides, such as v5e:4x4 or v5p:4x4x4"
        )
    sizes = tuple(int(size) for size in found["sizes"].split("x"))
    sides = 2 if found["kind"] in ("v5e", "v6e") else 3
    largest = 16 if sides == 2 else 64
    if len(sizes) != sides or not all(0 < size <= largest for size in sizes):
        raise ConfigError(
            f"`topology` {text!r} doesn't exist: a slice of {found['kind']} has {sides} sides of 1 "
            f"to {largest} chips, such as {found['kind']}:{'x'.join(['4'] * sides)}"
        )
    return DEVICES[found["kind"]], sizes


def parse_devices(text: str, memory: int | None = None) -> tuple[Device, int]:
    """Some devices, such as `8xH100`.

    Args:
        text: A number and a kind.
        memory: Bytes of each; by default those that the kind has.

    Returns:
        One of them, and how many there are.

    Raises:
        ConfigError: If there are no such devices.
    """
    found = _DEVICES.fullmatch(text)
    kind = found["kind"] if found else text
    known = {each.lower(): each for each in DEVICES}
    if found is None or kind.lower() not in known or int(found["count"]) < 1:
        hint = did_you_mean(kind, DEVICES) or f"; there are {', '.join(DEVICES)}"
        raise ConfigError(
            f"`devices` {text!r} is none that is known; give a number and a kind, such as 8xH100"
            f"{hint}"
        )
    device = DEVICES[known[kind.lower()]]
    return replace(device, memory=memory or device.memory), int(found["count"])


def parse_memory(text: str) -> int:
    """A size such as `24GB` or `16GiB`.

    Returns:
        Bytes.

    Raises:
        ConfigError: If it is none.
    """
    found = _MEMORY.fullmatch(text.strip())
    if found is None or not float(found["number"]):
        raise ConfigError(f"`memory` {text!r} is no size; give one such as 24GB or 16GiB")
    return int(float(found["number"]) * (GB if found["unit"].lower() == "gb" else GIB))


@dataclass(frozen=True)
class Machines:
    """The devices of one run.

    Attributes:
        device: Each of them.
        axes: Name of each axis of the mesh → how many lie along it.
        topology: Of a TPU, such as "v5p:4x4x4".
    """

    device: Device
    axes: Mapping[str, int] = field(default_factory=lambda: {"devices0": 1})
    topology: str | None = None

    @property
    def count(self) -> int:
        """How many devices there are."""
        return math.prod(self.axes.values())

    @property
    def hosts(self) -> int:
        """How many hosts they have."""
        return -(-self.count // self.device.per_host)

    def __str__(self) -> str:
        if self.topology:
            return f"{self.count} x TPU {self.device.name} ({self.topology})"
        return f"{self.count} x {self.device.name}, {bytes_in_words(self.device.memory)} each"
