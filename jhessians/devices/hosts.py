"""Several hosts: they join, check that they agree, fail together, and share arrays."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jhessians.devices.mesh import in_host_memory
from jhessians.devices.watch import watch
from jhessians.errors import MeshError, UserError
from jhessians.typing import Array

HEARTBEAT = 50
"""Seconds after which JAX gives a process up that doesn't answer, or doesn't come to the end."""


def start_hosts() -> None:
    """Join the other hosts of this run, if the environment names a coordinator.

    JAX_COORDINATOR_ADDRESS (host:port) names the coordinator, JAX_NUM_PROCESSES the number of
    processes, and JAX_PROCESS_ID this one's; on TPU pods and under SLURM the address is enough.

    Raises:
        MeshError: If they make no sense, or the others don't come within five minutes.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address or jax.distributed.is_initialized():
        return
    count, index = (_whole_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    # Its handler of SIGTERM would replace ours, and not end the run.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address, count, index,
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MeshError(
            f"process {index} of {count} cannot join the others at {address}: {reason}; check "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    if jax.process_count() > 1:
        watch(jax.process_index(), jax.process_count(), _everyones)


def _whole_number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise MeshError(f"{name} is {value!r}; expected a whole number")
    return None if value is None else int(value)


@contextmanager
def together() -> Iterator[None]:
    """Let an error that one host raises in the block end it on every host, so that none waits.

    Raises:
        UserError: On the hosts that did not fail, with the kind and the message of the first
            error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        line = "" if failure is None else f"{type(failure).__name__}:{failure}"
        for host, (kind, _, message) in enumerate(x.partition(":") for x in _everyones(line)):
            if kind and failure is None:
                kinds = {each.__name__: each for each in UserError.__subclasses__()}
                raise kinds.get(kind, UserError)(f"process {host} failed: {message}")
    if failure is not None:
        raise failure


def require_same(what: str, *values: Any) -> None:
    """Check that all hosts have equal values, before they set out to compute together.

    Args:
        what: Names the values in the message, in the plural.
        values: Arrays, or objects whose `repr` tells them apart.

    Raises:
        MeshError: On every host, if one differs.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    if len(set(_everyones(digest.hexdigest()))) > 1:
        raise MeshError(
            f"{what} differ between the {jax.process_count()} processes of this run; give all of "
            "them the same command and the same files"
        )


def _everyones(line: str, length: int = 1024) -> list[str]:
    """Exchange one line: every process's, each cut at `length` bytes."""
    from jax.experimental import multihost_utils

    buffer = np.zeros(length, np.uint8)
    encoded = line.encode()[:length]
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = multihost_utils.process_allgather(buffer)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def fetch(array: Array, index: Callable[[Array], Array] = lambda x: x) -> np.ndarray:
    """Bring an array, or a part of it, to every host as numpy; all hosts call this.

    Args:
        array: May be spread over devices and hosts.
        index: Takes the part that is wanted, by default all.

    Returns:
        The part as one array, the same on every host.
    """
    part = index(in_host_memory(array))
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    return np.asarray(part)


def most_of_hosts(count: int) -> int:
    """The largest of all hosts' numbers, which must be below 2³¹; all hosts call this."""
    return int(np.max(_of_hosts(count)))


def sum_of_hosts(count: int) -> int:
    """The sum of all hosts' numbers, each of which must be below 2³¹; all hosts call this."""
    return int(np.sum(_of_hosts(count), dtype=np.int64))


def _of_hosts(count: int) -> Any:
    if jax.process_count() == 1:
        return count
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(count))
