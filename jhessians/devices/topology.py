"""TPUs that aren't there: what their compiler knows of them is enough to compile for them."""

import os
import re
from functools import cache
from importlib.util import find_spec
from typing import Any

from jhessians.errors import MeshError

_FORM = re.compile(r"(v\w+):(\d+(?:x\d+){1,2})")
_ACCELERATORS = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
"""Kind of a TPU → what Cloud TPU calls it, and the cores of a chip, which its names count."""


@cache
def topology_devices(name: str) -> tuple[Any, ...]:
    """The devices of a TPU topology, for `make_mesh`; none of them need exist.

    A pass over shapes can be lowered and compiled for them (`Pass.lower`), not run.

    Args:
        name: Such as "v5e:4x4", "v5p:2x2x2" or "v6e:16x16".

    Returns:
        One for each chip.

    Raises:
        MeshError: If there is no such topology, or no compiler for TPUs.
    """
    match = _FORM.fullmatch(name)
    if match is None or match[1] not in _ACCELERATORS:
        raise _unknown(name)
    if find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise MeshError(
            f"compiling for {name} needs libtpu, which isn't installed; add it with "
            "`pip install libtpu`, which exists for Linux on x86-64"
        )
    _describe_machine(match[1], match[2])
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # of the runtime's own kinds, which have no common name
        raise _unknown(name, " ".join(str(error).split())[:200]) from error
    return tuple(found.devices)


def _unknown(name: str, reason: str = "") -> MeshError:
    because = f" ({reason})" if reason else ""
    return MeshError(
        f"there is no TPU topology {name!r}{because}; expected one such as v5e:4x4, v5p:2x2x2 or "
        f"v6e:16x16, of {', '.join(_ACCELERATORS)}"
    )


def _describe_machine(kind: str, shape: str) -> None:
    """Tell libtpu what it would otherwise ask a Cloud TPU machine, and wait for."""
    chips = 1
    for size in shape.split("x"):
        chips *= int(size)
    accelerator, cores = _ACCELERATORS[kind]
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing on a chip is shared
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{accelerator}-{cores * chips}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
