"""Several hosts: they join, check that they agree, fail together, and share arrays."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any

import jax
import numpy as np
from jax._src import distributed

from jhessians.devices.clusters import VARIABLES, Member, find_member
from jhessians.devices.ending import quiet_ends
from jhessians.devices.joining import joining
from jhessians.devices.mesh import in_host_memory
from jhessians.devices.place import waiting
from jhessians.devices.watch import is_watched, loss, name_of, watch
from jhessians.errors import MeshError, UserError
from jhessians.files import parse_json
from jhessians.typing import Array

LATER = 60
"""Seconds by which JAX itself gives a process up that doesn't answer after the others do."""

JOINING, STALLED = 180.0, 600.0
"""Seconds that the others get to come, and that all may stand still, unless somebody says more."""

_SAME_FILES = "give all of them the same files"


def start_hosts(*, joining_seconds: float = JOINING, stalled_seconds: float = STALLED) -> None:
    """Join the other hosts of this run, if there are any; nothing is done the second time.

    JAX_COORDINATOR_ADDRESS (host:port) names the coordinator, JAX_NUM_PROCESSES the number of
    processes, and JAX_PROCESS_ID this one's; without them SLURM, Open MPI, Kubernetes and Cloud TPU
    are asked. If the others don't come, the process ends with a line that says so.

    Args:
        joining_seconds: How long to wait for the others.
        stalled_seconds: After so long without a move of any process all end; infinite for never.

    Raises:
        MeshError: If what is said of them makes no sense.
    """
    if jax.distributed.is_initialized():
        _watch_others(stalled_seconds)
        return
    member = find_member(int(joining_seconds))
    if member is None:
        return
    # Its handler of SIGTERM would replace ours, and not end the run.
    jax.config.update("jax_enable_preemption_service", False)
    quiet_ends()
    with joining(member, joining_seconds):
        _initialize(member, joining_seconds, stalled_seconds)
        _watch_others(stalled_seconds)


def _initialize(member: Member, joining_seconds: float, stalled_seconds: float) -> None:
    later = int(min(stalled_seconds, 86400)) + LATER
    try:
        jax.distributed.initialize(
            member.address, member.count, member.index,
            local_device_ids=member.devices, cluster_detection_method="deactivate",
            # Its end is an abort; that of `joining` comes before.
            initialization_timeout=int(joining_seconds) + LATER,
            heartbeat_timeout_seconds=later,
            # Where the first process still writes, the others wait for it.
            shutdown_timeout_seconds=later,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MeshError(
            f"process {member.index} of {member.count} cannot join the others at "
            f"{member.address}: {reason}; check {VARIABLES}"
        ) from error


def _watch_others(stalled_seconds: float) -> None:
    if processes() > 1 and not is_watched():
        state = distributed.global_state
        first = str(state.coordinator_address).rpartition(":")[0].strip("[]")
        watch(state.process_id, state.num_processes, first, exchange, stalled_seconds)


def processes() -> int:
    """How many processes there are; JAX's own devices aren't asked, nor set up."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


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
    if processes() > 1:
        try:
            exchange("", failure)
        except Exception:
            if failure is None:
                raise
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
    if processes() == 1:
        return
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    everyones = dict(enumerate(exchange(digest.hexdigest())))
    _require_one(f"{what} differ", everyones, _SAME_FILES)


def require_equal(values: Mapping[str, Any], remedy: str) -> None:
    """Check that all hosts have equal values, and name the first that isn't, with both values.

    Args:
        values: Name → value, as JSON can write it.
        remedy: What to do if one differs.

    Raises:
        MeshError: On every host, if one differs.
    """
    if processes() == 1:
        return
    everyones = [parse_json(line) for line in exchange(json.dumps(values))]
    for name in everyones[0]:
        shown = [json.dumps(each.get(name), ensure_ascii=False) for each in everyones]
        _require_one(f"{name} differs", dict(enumerate(shown)), remedy, shown=True)


def require_same_in_turn(what: str, mine: str, of_next: str) -> None:
    """Check that what each host works on is what the host before it would have worked on.

    Args:
        what: Names it in the message, in the plural.
        mine: A hash of what this host works on.
        of_next: A hash of what it has in its place of what the next host works on.

    Raises:
        MeshError: On every host, if one differs.
    """
    if processes() == 1:
        return
    everyones = [line.split() for line in exchange(f"{mine} {of_next}")]
    for host, (_, expected) in enumerate(everyones):
        other = (host + 1) % len(everyones)
        pair = {host: expected, other: everyones[other][0]}
        _require_one(f"{what} differ", dict(sorted(pair.items())), _SAME_FILES)


def _require_one(
    what: str, by_host: Mapping[int, str], remedy: str, *, shown: bool = False
) -> None:
    """Check that all hosts have one value; that of the most, or the first, is taken for right."""
    values = list(by_host.values())
    usual = max(dict.fromkeys(values), key=values.count)
    odd = [host for host, value in by_host.items() if value != usual]
    if not odd:
        return
    right, others = values.index(usual), f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    right, first = list(by_host)[right], f"{name_of(odd[0])}{others}"
    words = f"{first} has others than {name_of(right)}"
    if shown:
        words = f"{by_host[odd[0]]} on {first}, {usual} on {name_of(right)}"
    raise MeshError(f"{what} between the {processes()} processes of this run: {words}; {remedy}")


_exchanges = count()
_FAILED = "failed "


def exchange(line: str, failure: Exception | None = None) -> list[str]:
    """Exchange one line: every process's, in order.

    It goes through the coordinator, not through the devices: nothing is compiled, lines have any
    length, and this process hears of signals while it waits.

    Args:
        line: This process's.
        failure: Why it has none.

    Returns:
        All of them.

    Raises:
        UserError: If another process failed and this one did not.
    """
    state = distributed.global_state
    client: Any = state.client
    number, me = next(_exchanges), state.process_id
    said = f"{_FAILED}{type(failure).__name__}:{failure}" if failure is not None else f"said {line}"
    client.key_value_set(f"jhessians/{number}/{me}", said)
    with waiting():
        lines = [_answer(client, f"jhessians/{number}/{host}") for host in range(processes())]
    if number > 0:  # all have read what was before: else they would not be here
        client.key_value_delete(f"jhessians/{number - 1}/{me}")
    for host, answer in enumerate(lines):
        if answer.startswith(_FAILED) and failure is None:
            kind, _, message = answer.removeprefix(_FAILED).partition(":")
            kinds = {each.__name__: each for each in UserError.__subclasses__()}
            raise kinds.get(kind, UserError)(f"process {host} failed: {message}")
    return [answer.removeprefix("said ") for answer in lines]


def _answer(client: Any, key: str) -> str:
    """A line of another process, whenever it comes."""
    while True:
        try:
            return str(client.blocking_key_value_get(key, 1000))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise MeshError(loss()) from error


def fetch(array: Array, index: Callable[[Array], Array] = lambda x: x) -> np.ndarray:
    """Bring an array, or a part of it, to every host as numpy; all hosts call this.

    Args:
        array: May be spread over devices and hosts.
        index: Takes the part that is wanted, by default all.

    Returns:
        The part as one array, the same on every host.
    """
    part = index(in_host_memory(array))
    if jax.process_count() == 1:
        return np.asarray(part)
    with waiting_for_devices():
        if isinstance(part, jax.Array) and not part.is_fully_addressable:
            from jax.experimental import multihost_utils

            part = multihost_utils.process_allgather(part, tiled=True)
        return np.asarray(part)


def waiting_for_devices() -> AbstractContextManager[None]:
    """The block waits for what the devices of all hosts compute together."""
    return waiting(computes=jax.default_backend() == "cpu")


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

    with waiting_for_devices():
        return multihost_utils.process_allgather(np.int32(count))
