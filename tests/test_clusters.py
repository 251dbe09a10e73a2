"""The files of configs/clusters and what docs/pods.md says of clusters.

Neither Slurm nor Kubernetes is here: programs of the same names stand for `srun`, `scancel`,
`scontrol` and `moe-jax`, and JAX's own detection of clusters reads what they set.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jax._src import clusters

from moe_jax.config.load import load_config
from tests.support import ROOT
from tests.support.command_line import check_command

SLURM = ROOT / "configs" / "clusters" / "slurm.sh"
JOBSET = ROOT / "configs" / "clusters" / "jobset.yaml"
PODS = (ROOT / "docs" / "pods.md").read_text()


def devices_of(config: str) -> int:
    return load_config(ROOT / "configs" / config, []).mesh.size


def detected() -> tuple[Any, ...]:
    """What JAX takes for coordinator, number of processes, number of this one and its devices."""
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 5)


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def sbatch_options() -> dict[str, str]:
    return dict(re.findall(r"(?m)^#SBATCH --([\w-]+)(?:=(\S+))?", SLURM.read_text()))


# Slurm

# Starts the command once per task, with the variables that Slurm sets for it, each after the one
# before; its exit code is the largest of theirs.
SRUN = """
echo "$*" >> srun.log
while [[ $1 == --* ]]; do shift; done
code=0
for ((task = 0; task < NODES * TASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % TASKS)) SLURM_NTASKS=$((NODES * TASKS)) \\
    SLURM_STEP_NODELIST="gpu[07-$((6 + NODES))]" "$@"
    ended=$?
    ((ended > code)) && code=$ended
done
exit $code
"""
# Writes down what it sees, and ends with the next of the exit codes in the file `codes`.
MOE_JAX = """
env | grep -E '^(SLURM_|MOE_JAX)' > task-$SLURM_PROCID
printf '%s\\n' "$@" > arguments
[[ -s codes ]] || exit 0
code=$(head -n 1 codes); sed -i 1d codes; exit $code
"""


def run_script(
    folder: Path, *arguments: str, nodes: int = 1, tasks: int = 1, srun: str = SRUN, **extra: str
) -> subprocess.CompletedProcess[str]:
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    program(programs, "srun", srun)
    program(programs, "moe-jax", MOE_JAX)
    program(programs, "sleep", "")
    program(programs, "scancel", 'echo "scancel $*" >> slurm.log; touch stopped')
    program(programs, "scontrol", 'echo "scontrol $*" >> slurm.log')
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_CPUS_PER_TASK": "8",
        "NODES": str(nodes),
        "TASKS": str(tasks),
        **extra,
    }
    return subprocess.run(
        [SLURM, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def test_slurm_asks_for_the_devices_of_the_large_configurations() -> None:
    options = sbatch_options()
    gpus = int(options["nodes"]) * int(options["gpus-per-node"])
    assert gpus == devices_of("qwen3-30b-a3b.yaml") == devices_of("mixtral-8x7b.yaml") == 64
    # JAX gives the process with SLURM_LOCALID i the GPU i alone.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options and "gpu-bind" not in options
    assert options["signal"] == "B:USR1@300"


def test_slurm_processes_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("my.yaml", "--run-dir", "runs/a name")
    nodes, tasks = 2, int(sbatch_options()["ntasks-per-node"])
    assert run_script(tmp_path, *given, nodes=nodes, tasks=tasks).returncode == 0
    assert (tmp_path / "arguments").read_text().splitlines() == ["train", *given, "--resume"]
    cache = f"MOE_JAX_CACHE={tmp_path}/.moe-jax-cache"  # one for all hosts
    for task in range(nodes * tasks):
        seen = (tmp_path / f"task-{task}").read_text().splitlines()
        assert cache in seen
        with monkeypatch.context() as patch:
            for line in seen:
                patch.setenv(*line.split("=", 1))
            # 61440 + job number mod 4096
            assert detected() == ("gpu07:62055", nodes * tasks, task, [task % tasks])
            patch.setenv("JAX_COORDINATOR_PORT", "1234")
            assert detected()[0] == "gpu07:1234"
    # srun does not take this from sbatch.
    assert "--cpus-per-task=8 " in (tmp_path / "srun.log").read_text()


@pytest.mark.parametrize(
    ("codes", "tries", "ended"),
    [([137, 75, 0], 3, 0), ([2], 1, 2), ([1, 69, 137, 1], 3, 137)],
    ids=["goes on after deaths", "a mistake", "too many deaths"],
)
def test_slurm_restarts(tmp_path: Path, codes: list[int], tries: int, ended: int) -> None:
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    result = run_script(tmp_path, "my.yaml", RESTARTS="2")
    assert result.returncode == ended
    assert len((tmp_path / "srun.log").read_text().splitlines()) == tries
    assert result.stderr.count("restart ") == tries - 1
    assert not (tmp_path / "slurm.log").exists()


def test_slurm_saves_and_waits_again_before_the_time_limit(tmp_path: Path) -> None:
    # The script is warned while the processes run, which end with 0 when they are asked to.
    srun = """
echo >> srun.log; kill -USR1 $PPID
until [[ -e stopped ]]; do /bin/sleep 0.05; done"""
    assert run_script(tmp_path, "my.yaml", srun=srun).returncode == 0
    log = (tmp_path / "slurm.log").read_text().splitlines()
    assert log == ["scancel --signal=TERM 4711", "scontrol requeue 4711"]
    assert len((tmp_path / "srun.log").read_text().splitlines()) == 1


# Kubernetes

# The fields in use: of JobSet's definition (jobset.x-k8s.io/v1alpha2, config/components/crd of
# kubernetes-sigs/jobset 08dfbdf), which has those of batch/v1 Job and of a pod in it. The whole
# file was checked against that schema once; it is too large (820 kB) to be kept here.
FIELDS: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": str,
                        "backoffLimit": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": str,
                                    "onExitCodes": {
                                        "containerName": str,
                                        "operator": str,
                                        "values": [int],
                                    },
                                }
                            ]
                        },
                        "template": {
                            "spec": {
                                "restartPolicy": str,
                                "terminationGracePeriodSeconds": int,
                                "nodeSelector": dict,
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "command": [str],
                                        "args": [str],
                                        "env": [{"name": str, "value": str}],
                                        "ports": [{"containerPort": int}],
                                        "resources": {"limits": dict},
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                    }
                                ],
                                "volumes": [
                                    {
                                        "name": str,
                                        "persistentVolumeClaim": {"claimName": str},
                                        "emptyDir": {"medium": str},
                                    }
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def check_fields(value: Any, fields: Any, where: str = "") -> None:
    if isinstance(fields, type):
        assert type(value) is fields, where
    elif isinstance(fields, list):
        assert isinstance(value, list), where
        for entry in value:
            check_fields(entry, fields[0], where)
    else:
        for key, inner in value.items():
            assert key in fields, f"{where}.{key}"
            check_fields(inner, fields[key], f"{where}.{key}")


@pytest.fixture(scope="module")
def jobset() -> Any:
    return yaml.safe_load(JOBSET.read_text())


def job_of(jobset: Any) -> tuple[Any, Any]:
    """The one replicated job, and its one container."""
    [job] = jobset["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    return job, container


def test_jobset_is_valid(jobset: Any) -> None:
    check_fields(jobset, FIELDS)
    job, container = job_of(jobset)
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    # Kubernetes refuses a policy on exit codes with another restart policy.
    assert pod["restartPolicy"] == "Never" and spec["completionMode"] == "Indexed"
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2],
    }
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_jobset_asks_for_the_devices_of_the_large_configurations(jobset: Any) -> None:
    job, container = job_of(jobset)
    spec = job["template"]["spec"]
    assert job["replicas"] == 1 and spec["completions"] == spec["parallelism"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"] * spec["parallelism"]
    assert gpus == devices_of("qwen3-30b-a3b.yaml") == devices_of("mixtral-8x7b.yaml")


def test_tpu_pods_of_the_document_have_as_many(jobset: Any) -> None:
    [block] = re.findall(r"(?ms)^```yaml\n(.*?)^```$", PODS)
    spec = yaml.safe_load(block)
    check_fields(spec, FIELDS["spec"]["replicatedJobs"][0]["template"]["spec"], "the part for TPUs")
    [container] = spec["template"]["spec"]["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"] * spec["parallelism"]
    topology = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    x, y, z = map(int, topology.split("x"))
    assert chips == x * y * z == devices_of("qwen3-30b-a3b.yaml")
    assert spec["completions"] == spec["parallelism"]


def start_container(folder: Path, jobset: Any, moe_jax: str) -> subprocess.Popen[str]:
    _, container = job_of(jobset)
    program(folder, "moe-jax", moe_jax)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "3"}
    return subprocess.Popen(
        [*container["command"], *container["args"]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_jobset_container_starts_the_command(tmp_path: Path, jobset: Any) -> None:
    _, container = job_of(jobset)
    started = start_container(tmp_path, jobset, "printf '%s\\n' \"$@\"; exit 2")
    words = started.communicate(timeout=60)[0].splitlines()
    assert started.returncode == 2  # as it is: the policy looks at it
    after_script = container["args"][2:]
    assert words[: len(after_script) + 2] == ["train", *after_script, "--resume"]
    assert words[words.index("--process-id") + 1] == "3"
    check_command(words)
    settings = [word.removeprefix("--set=") for word in after_script if word.startswith("--set=")]
    name = Path(after_script[0]).name
    assert load_config(ROOT / "configs" / name, settings).data.source == "/shared/text"


def test_jobset_container_saves_when_its_pod_is_moved(tmp_path: Path, jobset: Any) -> None:
    # Ends with 0, as a run that was asked to stop; the container must not.
    moe_jax = """trap 'sleep 0.2; echo saved; exit 0' TERM
touch runs; while :; do sleep 0.05; done"""
    started = start_container(tmp_path, jobset, moe_jax)
    end = time.monotonic() + 60
    while not (tmp_path / "runs").exists() and time.monotonic() < end:
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    assert started.communicate(timeout=60)[0] == "saved\n"
    assert started.returncode == 143


@pytest.fixture
def in_kubernetes(monkeypatch: pytest.MonkeyPatch, jobset: Any) -> Iterator[None]:
    """Pod 3 of the JobSet, as its controller and Kubernetes make it."""
    job, _ = job_of(jobset)
    name, subdomain = f"{jobset['metadata']['name']}-{job['name']}-0", jobset["metadata"]["name"]
    controller = SimpleNamespace(kind="Job", controller=True)
    pod = SimpleNamespace(
        metadata=SimpleNamespace(labels={"job-name": name}, owner_references=[controller]),
        spec=SimpleNamespace(subdomain=subdomain),
    )
    labels = {"jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"]}
    batch_job = SimpleNamespace(
        metadata=SimpleNamespace(name=name, labels=labels),
        spec=SimpleNamespace(parallelism=job["template"]["spec"]["parallelism"]),
    )
    pods = SimpleNamespace(
        list_namespaced_pod=lambda namespace, field_selector: SimpleNamespace(items=[pod])
    )
    jobs = SimpleNamespace(
        read_namespaced_job=lambda name, namespace: {batch_job.metadata.name: batch_job}[name]
    )
    # Where the package `kubernetes` is installed, JAX makes these three with it.
    monkeypatch.setattr(clusters.K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(clusters.K8sCluster, "_core_api", pods, raising=False)
    monkeypatch.setattr(clusters.K8sCluster, "_batch_api", jobs, raising=False)
    monkeypatch.setattr(clusters.K8sCluster, "_ApiException", Exception, raising=False)
    monkeypatch.setenv("HOSTNAME", f"{name}-3")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.1.2.3")
    monkeypatch.setattr(clusters.K8sCluster, "_namespace", lambda: "default")
    yield
    for name in ("_pod", "_job", "_controller"):  # which JAX asks for once per process
        getattr(clusters.K8sCluster, name).__func__.cache_clear()


def test_jobset_names_what_jax_would_find(in_kubernetes: None, jobset: Any) -> None:
    script = job_of(jobset)[1]["args"][0]
    address = re.search(r"--coordinator (\S+)", script)
    processes = re.search(r"--num-processes (\d+)", script)
    assert address and processes
    assert detected() == (address[1], int(processes[1]), 3, None)  # None: all GPUs of the pod
    assert f":{job_of(jobset)[1]['ports'][0]['containerPort']}" in address[1]


# What docs/pods.md says of the others.


def test_open_mpi_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "16")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "9")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    port = 61440 + 1531576320 // 4096 % 4096
    assert detected() == (f"10.96.0.1:{port}", 16, 9, [1])


def test_cloud_tpus_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (clusters.cluster, clusters.cloud_tpu_cluster)
    for module in modules:
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.1.2.3")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    metadata = {
        "agent-worker-number": "5",
        "worker-network-endpoints": ",".join(f"host{worker}" for worker in range(16)),
        "tpu-env": "",
    }
    tpu: Any = clusters.cloud_tpu_cluster
    with monkeypatch.context() as patch:
        patch.setattr(tpu, "get_metadata", lambda key: (metadata[key], 200))
        assert detected() == ("host0:8482", 16, 5, None)
    # In GKE the variables say it.
    monkeypatch.setattr(tpu, "get_metadata", lambda key: ("", 404))
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", metadata["worker-network-endpoints"])
    assert detected() == ("host0:8482", 16, 2, None)
