"""What XLA makes of our steps on TPUs: compiled for chips that aren't there.

The HLO for CPUs doesn't show this: there a reduce-scatter always stays one.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices.tpu_steps import EXPERTS, INPUTS, NARROW, VOCABULARY, WIDE, WIDTH

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
IS_BUILT = sys.platform == "linux" and platform.machine() == "x86_64"
REQUIRED = IS_BUILT and os.environ.get("CI") == "true"
pytestmark = pytest.mark.skipif(
    not HAS_LIBTPU and not REQUIRED, reason="libtpu isn't installed, or not made for this platform"
)

STEPS = ["v5e:4x4/linear", "v5p:2x2x2/linear", "v5p:4x4x4/wide", "v6e:16x16/wide",
         "v5e:4x4/linear/corrected", "v5e:4x4/decoder", "v5e:4x4/experts"]  # fmt: skip
FLAT = "v5e:4x4/linear/axes=16"
WIRED = ["v5e:2x2", "v5e:8x8", "v5p:2x2x1", "v5p:4x4x8", "v6e:2x4"]


@pytest.fixture(scope="module")
def steps():
    """Of each step its axes, collectives and memory."""
    command = [sys.executable, "-m", "tests.devices.tpu_steps", *STEPS, FLAT, *WIRED]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("step", STEPS)
def test_factors_are_scattered_while_they_are_added(steps, step):
    found = steps[step]["collectives"]
    small = NARROW * WIDE if "wide" in step else 1  # the other factor, or the loss
    assert max(found["all-reduce"]) <= small
    assert found["reduce-scatter"]


def test_over_a_long_axis_they_would_not_be(steps):
    """What the others are measured by: factors whole on every chip."""
    assert max(steps[FLAT]["collectives"]["all-reduce"]) >= INPUTS * INPUTS // 3


def test_axes_follow_the_wiring_and_are_short(steps):
    axes = {name.partition("/")[0]: each["axes"] for name, each in steps.items() if name != FLAT}
    assert axes == {
        "v5e:2x2": [2, 2], "v6e:2x4": [2, 4], "v5e:4x4": [4, 4], "v5e:8x8": [4, 4, 2, 2],
        "v6e:16x16": [4, 4, 4, 4], "v5p:2x2x1": [2, 2], "v5p:2x2x2": [2, 2, 2],
        "v5p:4x4x4": [4, 4, 4], "v5p:4x4x8": [4, 4, 4, 2],
    }  # fmt: skip


def test_no_embedding_is_ever_whole(steps):
    step = steps["v5e:4x4/decoder"]
    table = VOCABULARY * WIDTH
    assert 0 < max(step["collectives"]["all-gather"]) < table // 4
    assert step["peak"] < 2 * 2 * table  # one of the two tables, in bfloat16


def test_experts_are_gathered_one_by_one(steps):
    step = steps["v5e:4x4/experts"]
    expert = WIDTH * 2 * WIDTH
    assert max(step["collectives"]["all-gather"]) <= 2 * expert
    assert step["peak"] < 2 * EXPERTS * expert
