"""The launch recipes in examples/clusters say what their tools and ours understand."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jhessians.cli.main import parse
from jhessians.commands.table import COMMANDS

CLUSTERS = Path(__file__).parent.parent / "examples" / "clusters"


def dry_run(script, *arguments, **environment):
    done = subprocess.run(
        ["bash", str(CLUSTERS / script), *arguments],
        env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [shlex.split(line) for line in done.stdout.splitlines()]


def require_understood(words):
    """A command line of ours is one."""
    program, name, *rest = words
    assert program == "jhessians"
    return parse(COMMANDS[name], rest)


@pytest.mark.parametrize("script", sorted(path.name for path in CLUSTERS.glob("*.sh")))
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(CLUSTERS / script)], check=True)


def test_slurm(tmp_path):
    """`srun` is a stand-in that shows its arguments."""
    stand_in = tmp_path / "srun"
    stand_in.write_text('#!/bin/bash\nprintf "%q " "$@"; echo\n')
    stand_in.chmod(0o755)
    (words,) = dry_run(
        "slurm.sh", "run", "--model", "m", "--dataset", "d", "--fsdp",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    ours = words[words.index("jhessians") :]
    assert require_understood(ours).resume
    text = (CLUSTERS / "slurm.sh").read_text()
    if shutil.which("sbatch"):
        subprocess.run(["sbatch", "--test-only", str(CLUSTERS / "slurm.sh")], check=True)
    # One task a node has all GPUs of its node: see jhessians/devices/clusters.py.
    assert "#SBATCH --ntasks-per-node=1\n" in text


def test_jobset():
    (found,) = yaml.safe_load_all((CLUSTERS / "jobset.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    config = require_understood([*container["command"], *container["args"]])
    assert config.resume and pod["terminationGracePeriodSeconds"] > config.grace_seconds
    environment = {each["name"]: each for each in container["env"]}
    assert int(environment["JAX_NUM_PROCESSES"]["value"]) == job["completions"]
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    # JobSet names pods <jobset>-<job>-<replica>-<index>, under a service of the jobset's name.
    name = found["metadata"]["name"]
    host = f"{name}-{replicated['name']}-0-0.{name}"
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"].rpartition(":")[0] == host
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["volumes"]}


def test_cloud_tpu():
    lines = dry_run(
        "cloud_tpu.sh", "the model", "d.jsonl", DRY_RUN="1", PROJECT="p", ZONE="z", NFS="n:/x"
    )
    (ours,) = [line[-1] for line in lines if "jhessians compute" in line[-1]]
    config = require_understood(shlex.split(ours))
    assert config.model == "the model" and config.fsdp and config.resume
    for words in lines:
        assert words[:3] == ["gcloud", "compute", "tpus"]
        if shutil.which("gcloud"):
            require_known(words)


def require_known(words):
    """Every flag is one that gcloud's own help has."""
    end = next(i for i, word in enumerate(words) if i > 3 and word in ("create", "ssh", "delete"))
    done = subprocess.run(
        [*words[: end + 1], "--help"], capture_output=True, text=True, check=True,
        env=os.environ | {"PAGER": "cat", "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
    )  # fmt: skip
    for word in words[end:]:
        if word.startswith("--"):
            assert word in done.stdout, word
