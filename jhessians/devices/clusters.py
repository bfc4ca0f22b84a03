"""Which processes belong to a run: as its user says, or as the cluster that started them does.

JAX asks SLURM, Open MPI, Kubernetes and Cloud TPU for it. A single process among these, on a login
node, in a notebook's pod or as a job's only task, stays alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jhessians.errors import MeshError

_log = logging.getLogger("jhessians")


@dataclass(frozen=True)
class Member:
    """This process's place in a run.

    Attributes:
        address: host:port of the coordinator, which is on the first process's machine.
        count: How many processes there are.
        index: This one's number, from 0.
        devices: Numbers of the machine's GPUs that are this process's; None for all it sees.
        source: Who says so, for messages.
    """

    address: str
    count: int
    index: int
    devices: Sequence[int] | None
    source: str


VARIABLES = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"


def find_member(seconds: int) -> Member | None:
    """This process's place in a run of several.

    Args:
        seconds: How long to wait for the name of the first process's machine to be known.

    Returns:
        None if it is alone.

    Raises:
        MeshError: If the environment says something that makes no sense, or not enough.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    count, index = (_whole_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if count == 1:
        return None
    if address and not address.rpartition(":")[2].isdecimal():
        raise MeshError(f"JAX_COORDINATOR_ADDRESS is {address!r}; expected host:port")
    found = None
    if address is None or count is None or index is None:
        found = _of_cluster(seconds, address)
    elif index < count:
        return Member(address, count, index, None, "the environment")
    if address is None or found is not None:
        return found
    if count is None or index is None:
        raise MeshError(
            f"JAX_COORDINATOR_ADDRESS is {address!r}, but how many processes there are, or which "
            f"of them this is, isn't known; give {VARIABLES}"
        )
    raise MeshError(f"JAX_PROCESS_ID is {index}; expected 0 to {count - 1}")


def _of_cluster(seconds: int, address: str | None) -> Member | None:
    """The place that a cluster gives; None outside of one, or for a single process.

    Args:
        seconds: See `find_member`.
        address: The coordinator's, if it is known already.

    Returns:
        The place.

    Raises:
        MeshError: If there are others, but it isn't known where.
    """
    if _tasks() > 1:
        return _asked("SlurmCluster", "SLURM", seconds, address)
    if _open_mpi("SIZE") > 1:
        return _asked("OmpiCluster", "Open MPI", seconds, address)
    try:
        if _is_in_indexed_job():
            return _asked("K8sCluster", "Kubernetes", seconds, address)
        if _has_tpu():
            return _asked("GkeTpuCluster", "Cloud TPU", seconds, address) or _asked(
                "GceTpuCluster", "Cloud TPU", seconds, address
            )
    except Exception as error:  # whatever these services' libraries meet
        _log.warning(
            "whether other processes belong to this one isn't known: %s; it computes alone; give "
            "%s, or JAX_NUM_PROCESSES=1", _in_a_line(error), VARIABLES,
        )  # fmt: skip
    return None


def _asked(name: str, source: str, seconds: int, address: str | None) -> Member | None:
    """What one of JAX's classes of clusters says; None if that isn't there, or of one process."""
    from jax._src import clusters

    known = clusters.ClusterEnv._cluster_types
    cluster: Any = next(each for each in known if each.__name__ == name)
    if source == "SLURM":
        count, index = _tasks(), int(os.environ["SLURM_PROCID"])
    elif source == "Open MPI":
        count, index = _open_mpi("SIZE"), _open_mpi("RANK")
    elif not cluster.is_env_present():
        return None
    else:
        count, index = cluster.get_process_count(), cluster.get_process_id()
    if count == 1:
        return None
    if address is None:
        try:
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = str(
                cluster.get_coordinator_address(
                    timeout_secs=seconds, override_coordinator_port=port
                )
            )
        except Exception as error:  # Open MPI 5 doesn't say where the first process is
            raise MeshError(
                f"{source} started {count} processes, but not to be found out is where the first "
                f"one is ({_in_a_line(error)}); give JAX_COORDINATOR_ADDRESS=host:port, or "
                "JAX_NUM_PROCESSES=1 if each is to compute alone"
            ) from error
    return Member(address, count, index, _own_devices(source), source)


def _tasks() -> int:
    """Tasks of the step of SLURM's that this is one of; 1 outside of `srun`."""
    if "SLURM_STEP_NODELIST" not in os.environ or "SLURM_PROCID" not in os.environ:
        return 1
    # The number of the job's, where both are there, may be another one.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1")


def _open_mpi(name: str) -> int:
    """A number of `mpirun`'s; 1 outside of it."""
    return int(os.environ.get(f"OMPI_COMM_WORLD_{name}") or "1")


def _is_in_indexed_job() -> bool:
    """Whether this is one of an indexed Job's pods: any other pod has no number among others."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ


def _has_tpu() -> bool:
    """Whether there are chips to compute on, which may belong to several machines."""
    from jax._src import cloud_tpu_init

    platforms = os.environ.get("JAX_PLATFORMS", "")
    return cloud_tpu_init.running_in_cloud_tpu_vm and (not platforms or "tpu" in platforms)


def _own_devices(source: str) -> list[int] | None:
    """This process's GPU where others of the run are on its machine; None for all."""
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):  # JAX reads it
        return None
    if source == "SLURM":
        # Such as "2(x3),1": two tasks on each of three machines and one on the last.
        tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")
        alone = {each.split("(")[0] for each in tasks} == {"1"}
        return None if alone else [int(os.environ["SLURM_LOCALID"])]
    if source == "Open MPI" and _open_mpi("LOCAL_SIZE") > 1:
        return [_open_mpi("LOCAL_RANK")]
    return None


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _whole_number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise MeshError(f"{name} is {value!r}; expected a whole number")
    return None if value is None else int(value)
