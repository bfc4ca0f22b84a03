"""Machines as a person writes them, and how fast they multiply."""

import pytest

from jhessians.errors import ConfigError
from jhessians.planning.hardware import (
    DEVICES,
    Machines,
    parse_devices,
    parse_memory,
    parse_topology,
)


def test_what_can_be_written():
    device, sides = parse_topology("v5p:4x4x8")
    assert (device.name, sides) == ("v5p", (4, 4, 8))
    device, count = parse_devices("16xh100")
    assert (device.name, device.memory, count) == ("H100", 80 * 10**9, 16)
    assert parse_devices("2xL4", parse_memory("20 GB"))[0].memory == 20 * 10**9
    assert parse_memory("16GiB") == 16 << 30 and parse_memory("1.5gb") == 1_500_000_000


@pytest.mark.parametrize(
    "parse, text, words",
    [
        (parse_topology, "v9:4x4", "none that is known"),
        (parse_topology, "v5e:4x4x4", "2 sides"),
        (parse_topology, "v5p:4x4", "3 sides"),
        (parse_topology, "v5e:32x32", "1 to 16"),
        (parse_devices, "8xH10", "did you mean"),
        (parse_devices, "H100", "a number and a kind"),
        (parse_devices, "0xH100", "a number and a kind"),
        (parse_memory, "24", "24GB or 16GiB"),
        (parse_memory, "0GB", "24GB or 16GiB"),
    ],
)
def test_what_can_not(parse, text, words):
    with pytest.raises(ConfigError, match=words):
        parse(text)


def test_products_of_float32_numbers():
    """On a TPU they are six of bfloat16 numbers; a GPU has units for them, or splits them, too."""
    v5e, h100 = DEVICES["v5e"], DEVICES["H100"]
    assert v5e.speed("bf16", "highest") == 197e12
    assert v5e.speed("fp32", "highest") == v5e.speed("fp32", "bf16_x6") == 197e12 / 6
    assert v5e.speed("fp64", "highest") == 0
    assert h100.speed("fp32", "highest") == 67e12
    assert h100.speed("fp32", "tf32_x3") == 495e12 / 3


def test_hosts_and_devices():
    machines = Machines(DEVICES["v5p"], {"devices0": 4, "devices1": 4, "devices2": 4}, "v5p:4x4x4")
    assert (machines.count, machines.hosts) == (64, 16)
    assert str(machines) == "64 x TPU v5p (v5p:4x4x4)"
    for device in DEVICES.values():
        assert device.memory >= 16 << 30 and device.cores and device.bandwidth > device.link
