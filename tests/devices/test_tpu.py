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

from tests.devices.tpu_steps import VOCABULARY, WIDTH

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
IS_BUILT = sys.platform == "linux" and platform.machine() == "x86_64"
REQUIRED = IS_BUILT and os.environ.get("CI") == "true"
pytestmark = pytest.mark.skipif(
    not HAS_LIBTPU and not REQUIRED, reason="libtpu isn't installed, or not made for this platform"
)

DENSE = ["v5e:4x4", "v5p:2x2x2", "v5e:4x4/corrected"]
WITH_EXPERTS = "v5e:4x4/experts"
FLAT = "v5e:4x4/axes=16"


@pytest.fixture(scope="module")
def steps():
    """Of each step its axes, collectives and memory."""
    command = [sys.executable, "-m", "tests.devices.tpu_steps", *DENSE, WITH_EXPERTS, FLAT]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("step", [*DENSE, WITH_EXPERTS])
def test_factors_are_reduced_and_scattered_in_one(steps, step):
    found = steps[step]["collectives"]
    assert max(found["all-reduce"]) < WIDTH
    assert max(found["reduce-scatter"]) > WIDTH


def test_over_a_long_axis_they_would_not_be(steps):
    """What the others are measured by: factors whole on every device."""
    assert max(steps[FLAT]["collectives"]["all-reduce"]) > WIDTH * WIDTH // 3


@pytest.mark.parametrize("step", DENSE)
def test_no_embedding_is_ever_whole(steps, step):
    assert 0 < max(steps[step]["collectives"]["all-gather"]) < VOCABULARY * WIDTH // 4
    assert steps[step]["temporary"] < 2 * VOCABULARY * WIDTH
