"""Which processes belong to a run, by the variables that clusters set; a process alone stays so."""

import pytest
from jax._src import cloud_tpu_init, clusters

from jhessians.devices.clusters import find_member
from jhessians.errors import MeshError

SLURM = {
    "SLURM_JOB_ID": "70000", "SLURM_STEP_NODELIST": "node[007-010],other", "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "1(x5)", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "a:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
TPU = {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": "1"}


@pytest.fixture
def environment(monkeypatch):
    others = ("JAX_PLATFORMS", "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_PORT",
              "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")  # fmt: skip
    for name in (*SLURM, *OPEN_MPI, *VARIABLES, *TPU, *others):
        monkeypatch.delenv(name, raising=False)

    def give(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize("given, expected", [
    # JAX chooses SLURM's port by the job's number: 61440 + 70000 mod 4096.
    (SLURM, ("node007:61808", 5, 3, None)),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_LOCALID": "1"},
     ("node007:61808", 5, 3, [1])),
    (SLURM | {"SLURM_NTASKS": "9"}, ("node007:61808", 5, 3, None)),
    (SLURM | {"JAX_COORDINATOR_PORT": "99"}, ("node007:99", 5, 3, None)),
    (SLURM | {"JAX_COORDINATOR_ADDRESS": "b:1"}, ("b:1", 5, 3, None)),
    # 61440 + (1314521088 / 4096) mod 4096.
    (OPEN_MPI, ("10.96.0.1:62880", 4, 2, [1])),
    (OPEN_MPI | {"JAX_LOCAL_DEVICE_IDS": "0"}, ("10.96.0.1:62880", 4, 2, None)),
    (VARIABLES, ("a:1234", 3, 2, None)),
    (SLURM | VARIABLES, ("a:1234", 3, 2, None)),
])  # fmt: skip
def test_members(environment, given, expected):
    environment(given)
    found = find_member(1)
    assert (found.address, found.count, found.index, found.devices) == expected


@pytest.mark.parametrize("given", [
    {},
    # A login node, sbatch's own script, one task, an interactive step of a larger job.
    {"SLURM_JOB_ID": "7"},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
    OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    SLURM | {"JAX_NUM_PROCESSES": "1"},
    # A notebook's pod, and a machine without chips.
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    TPU,
    {"JAX_COORDINATOR_ADDRESS": ""},
    {"JAX_PROCESS_ID": "0"},
])  # fmt: skip
def test_a_process_alone(environment, given):
    environment(given)
    assert find_member(1) is None


def test_tpu_pod(environment, monkeypatch):
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.cloud_tpu_cluster, "get_tpu_env_value", lambda key: None)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    environment(TPU)
    found = find_member(1)
    assert (found.address, found.count, found.index) == ("localhost:8482", 2, 1)
    environment({"JAX_PLATFORMS": "cpu"})
    assert find_member(1) is None
    environment({"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert find_member(1) is None


def test_pods_of_a_job(environment, monkeypatch, caplog):
    class Pods(clusters.K8sCluster):
        """Not asked over the network; removed again below, since JAX registers every class."""

    clusters.ClusterEnv._cluster_types.remove(Pods)
    Pods.__name__ = "K8sCluster"
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [Pods])
    monkeypatch.setattr(Pods, "is_env_present", classmethod(lambda cls: True))
    monkeypatch.setattr(Pods, "get_process_count", classmethod(lambda cls: 4))
    monkeypatch.setattr(Pods, "get_process_id", classmethod(lambda cls: 3))
    monkeypatch.setattr(
        Pods, "get_coordinator_address",
        classmethod(lambda cls, timeout_secs, override_coordinator_port: "pod-0:55527"),
    )  # fmt: skip
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"})
    found = find_member(1)
    assert (found.address, found.count, found.index, found.devices) == ("pod-0:55527", 4, 3, None)

    def forbidden(cls):
        raise RuntimeError("Kubernetes API Error: 403\nForbidden")

    monkeypatch.setattr(Pods, "get_process_count", classmethod(forbidden))
    assert find_member(1) is None
    assert "403 Forbidden; it computes alone; give JAX_COORDINATOR_ADDRESS" in caplog.text


@pytest.mark.parametrize("given, said", [
    ({"JAX_COORDINATOR_ADDRESS": "a"}, "'a'; expected host:port"),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "how many processes there are"),
    (VARIABLES | {"JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID is 3; expected 0 to 2"),
    (VARIABLES | {"JAX_NUM_PROCESSES": "x"}, "'x'; expected a whole number"),
    # Open MPI 5 doesn't say where the first process is.
    ({n: v for n, v in OPEN_MPI.items() if "uri" not in n}, "give JAX_COORDINATOR_ADDRESS="),
])  # fmt: skip
def test_what_makes_no_sense(environment, given, said):
    environment(given)
    with pytest.raises(MeshError, match=".*") as caught:
        find_member(1)
    assert said in str(caught.value)
