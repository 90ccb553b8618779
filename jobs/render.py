"""Manifests of jobs for a cluster, rendered from a few facts: python -m jobs.render TARGET FACTS.yaml > manifest.

Targets: volcano-train, kubernetes-train, slurm-train (facts as in jobs/facts_train.yaml), volcano-spark and
kubernetes-spark (jobs/facts_spark.yaml). All of them run the scripts beside this file, in the images of docker/. How a
job is started again: after exit code 85 (told to stop, and saved), after a lost pod or node, and after a rank that died
or hung; never after 2 (wrong input).
"""

import difflib
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from kanyun.cli.parser import Parser
from kanyun.errors import UserError, run_cli
from trainer.stopping import PREEMPTED

WRONG_INPUT = 2
MOST_RESTARTS = 100  # each preemption is one
MASTER_PORT = 29500
ROOT = "/opt/kanyun"  # of the images
USER = 10001  # of the images
CONF = "/opt/hadoop/conf"
Manifest = dict[str, Any]


class Facts(BaseModel):
    """What is to be known of any job."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Of a Service, too: part of host names.
    name: str = Field(pattern=r"^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$")
    namespace: str = "default"
    image: str
    command: list[str] = Field(min_length=1)
    queue: str = "default"
    cpus: PositiveInt
    memory: str
    volumes: dict[str, str] = {}
    hadoop_conf: str = ""
    env: dict[str, str] = {}


class TrainFacts(Facts):
    nodes: PositiveInt
    gpus: PositiveInt
    shared_memory: str = "64Gi"
    rdma: dict[str, PositiveInt] = {}
    host_network: bool = False
    grace_seconds: PositiveInt = 900


class SparkFacts(Facts):
    executors: PositiveInt
    executor_cores: PositiveInt = 4
    executor_memory: str = "6g"
    service_account: str = "spark"


def load_facts[T: Facts](path: str, kind: type[T]) -> T:
    """Raises UserError, one sentence for each fact that is missing, unknown or of a wrong kind."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return kind.model_validate(values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}): correct it") from error
    except ValidationError as error:
        raise UserError("; ".join(_sentence(path, kind, problem) for problem in error.errors())) from error


def _sentence(path: str, kind: type[Facts], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0)[0]
        return f"{path} has an unknown fact {key!r}: did you mean {near!r}?"
    if problem["type"] == "missing":
        return f"{path} has no {key}: add `{key}: ...`"
    message = problem["msg"].replace("Input should", "it should").replace("String should", "it should")
    return f"{path}: {key or 'all of it'} is {problem['input']!r}: {message}"


def volcano_train(facts: TrainFacts) -> list[Manifest]:
    """One task, worker: all pods at once or none; plugins give each its number and the name of the first."""
    pod = _training_pod(facts, {"MASTER_PORT": str(MASTER_PORT)})
    policies: list[Manifest] = [
        {"exitCode": PREEMPTED, "action": "RestartJob"},
        {"exitCode": WRONG_INPUT, "action": "TerminateJob"},
        {"events": ["PodFailed", "PodEvicted"], "action": "RestartJob"},
        {"event": "TaskCompleted", "action": "CompleteJob"},
    ]
    job = _volcano(facts, "worker", facts.nodes, pod, policies, MOST_RESTARTS)
    # svc gives the pods names, and a network policy by which they hear only one another.
    job["spec"]["plugins"] = {"env": [], "svc": ["--publish-not-ready-addresses=true"]}
    return [*_hadoop_conf(facts), job]


def kubernetes_train(facts: TrainFacts) -> list[Manifest]:
    """An indexed Job and its names. A lost pod alone is started again: the others notice after `hang_after`, exit with
    86, and are started again, too. Volcano restarts all of them at once.
    """
    first = f"{facts.name}-0.{facts.name}"
    pod = _training_pod(facts, {"NNODES": str(facts.nodes), "MASTER_ADDR": first, "MASTER_PORT": str(MASTER_PORT)})
    pod["spec"]["subdomain"] = facts.name
    labels = {"app": facts.name}
    pod["metadata"] = {"labels": labels}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(facts),
        # The first pod is looked for before it is ready.
        "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
    }
    rules = [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [WRONG_INPUT]}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [PREEMPTED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    spec = {
        "completions": facts.nodes,
        "parallelism": facts.nodes,
        "completionMode": "Indexed",
        "backoffLimit": MOST_RESTARTS,
        "podFailurePolicy": {"rules": rules},
        "template": pod,
    }
    return [*_hadoop_conf(facts), service, _job(facts, spec)]


def volcano_spark(facts: SparkFacts) -> list[Manifest]:
    """The driver's pod; executors are pods that it makes, and Volcano places as it does the driver."""
    pod = _driver_pod(facts, scheduler="volcano")
    policies: list[Manifest] = [
        {"exitCode": WRONG_INPUT, "action": "TerminateJob"},
        {"events": ["PodFailed", "PodEvicted"], "action": "RestartJob"},
        {"event": "TaskCompleted", "action": "CompleteJob"},
    ]
    return [_spark_conf(facts, "volcano"), _volcano(facts, "driver", 1, pod, policies, 3)]


def kubernetes_spark(facts: SparkFacts) -> list[Manifest]:
    """The driver's pod as a Job: what is finished is skipped, so it may be started again."""
    rules = [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [WRONG_INPUT]}}]
    spec = {"backoffLimit": 3, "podFailurePolicy": {"rules": rules}, "template": _driver_pod(facts, scheduler="")}
    return [_spark_conf(facts, ""), _job(facts, spec)]


def slurm_train(facts: TrainFacts) -> str:
    """A batch script. Its time limit sends USR1 early enough for a save; then the job is queued again."""
    settings = {"MASTER_PORT": str(MASTER_PORT), **_train_env(facts)}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items())
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={facts.name}
#SBATCH --partition={facts.queue}
#SBATCH --nodes={facts.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={facts.gpus}
#SBATCH --cpus-per-task={facts.cpus}
#SBATCH --mem={facts.memory.removesuffix("i")}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{facts.grace_seconds}
# Run it in the root of the repository, on a disk that all nodes share: sbatch {facts.name}.sh
set -uo pipefail
{exports}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
for _ in {{1..{MOST_RESTARTS}}}; do
  # A rank that fails ends the step on all nodes; the next step goes on from the last checkpoint.
  srun --kill-on-bad-exit=1 {shlex.join(facts.command)} &
  step=$! told=1 code=0
  trap 'kill -USR1 "$step"; told=1' USR1 TERM
  while ((told)); do # a signal, which srun hands on to the ranks, ends the wait before the step
    told=0
    wait "$step"
    ended=$?
    ((ended == 127)) || code=$ended
  done
  case $code in
    0 | {WRONG_INPUT}) exit "$code" ;;
    {PREEMPTED}) exec scontrol requeue "$SLURM_JOB_ID" ;;
  esac
done
exit "$code"
"""


def _metadata(facts: Facts, suffix: str = "") -> Manifest:
    return {"name": facts.name + suffix, "namespace": facts.namespace}


def _job(facts: Facts, spec: Manifest) -> Manifest:
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(facts), "spec": spec}


def _volcano(
    facts: Facts, task: str, replicas: int, pod: Manifest, policies: list[Manifest], restarts: int
) -> Manifest:
    spec = {
        "schedulerName": "volcano",
        "queue": facts.queue,
        "minAvailable": replicas,
        "maxRetry": restarts,
        "policies": policies,
        "tasks": [{"name": task, "replicas": replicas, "template": pod}],
    }
    return {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "metadata": _metadata(facts), "spec": spec}


def _train_env(facts: TrainFacts) -> dict[str, str]:
    # The scheduler starts all nodes again together: one that started its ranks alone would wait for the others.
    restarts = {"RESTARTS": "0"} if facts.nodes > 1 else {}
    conf = {"HADOOP_CONF_DIR": CONF} if facts.hadoop_conf else {}
    return {**restarts, **conf, **facts.env}


def _training_pod(facts: TrainFacts, env: dict[str, str]) -> Manifest:
    resources = {
        "cpu": facts.cpus,
        "memory": facts.memory,
        "nvidia.com/gpu": facts.gpus,
        **facts.rdma,
    }
    capabilities = {"capabilities": {"add": ["IPC_LOCK"]}} if facts.rdma else {}  # RDMA pins its buffers
    container = _container(facts, "train", {**env, **_train_env(facts)}, resources, capabilities)
    container["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    spec = _pod_spec(facts, container)
    memory = {"emptyDir": {"medium": "Memory", "sizeLimit": facts.shared_memory}}
    spec["volumes"].append({"name": "shared-memory", **memory})
    spec["terminationGracePeriodSeconds"] = facts.grace_seconds
    if facts.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return {"spec": spec}


def _driver_pod(facts: SparkFacts, scheduler: str) -> Manifest:
    options = [
        f"--conf spark.executor.instances={facts.executors}",
        f"--executor-cores {facts.executor_cores}",
        f"--executor-memory {facts.executor_memory}",
        f"--conf spark.kubernetes.authenticate.driver.serviceAccountName={facts.service_account}",
    ]
    if scheduler:
        options.append(f"--conf spark.kubernetes.scheduler.name={scheduler}")
    env = {
        "SPARK_MASTER": "k8s://https://kubernetes.default.svc",
        "SPARK_IMAGE": facts.image,
        "SPARK_NAMESPACE": facts.namespace,
        "SPARK_POD_TEMPLATE": f"{CONF}/executor.yaml",
        "SPARK_SUBMIT_OPTIONS": " ".join(options),
        "HADOOP_CONF_DIR": CONF,
        **facts.env,
    }
    resources = {"cpu": facts.cpus, "memory": facts.memory}
    container = _container(facts, "driver", env, resources, {}, conf=True)
    for name, field in (("POD_NAME", "metadata.name"), ("POD_IP", "status.podIP")):
        container["env"].append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}})
    return {"spec": {"serviceAccountName": facts.service_account, **_pod_spec(facts, container, conf=True)}}


def _container(
    facts: Facts, name: str, env: dict[str, str], resources: Manifest, security: Manifest, conf: bool = False
) -> Manifest:
    mounts = [{"name": claim, "mountPath": path} for claim, path in facts.volumes.items()]
    if facts.hadoop_conf or conf:
        mounts.append({"name": "conf", "mountPath": CONF})
    amounts = {key: str(value) for key, value in resources.items()}
    return {
        "name": name,
        "image": facts.image,
        "workingDir": ROOT,
        "command": ["tini", "--", *facts.command],
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "securityContext": {"allowPrivilegeEscalation": False, **security},
        "volumeMounts": mounts,
    }


def _pod_spec(facts: Facts, container: Manifest, conf: bool = False) -> Manifest:
    claims = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in facts.volumes]
    if facts.hadoop_conf or conf:
        claims.append({"name": "conf", "configMap": {"name": f"{facts.name}-conf"}})
    return {
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER},
        "containers": [container],
        "volumes": claims,
    }


def _hadoop_files(facts: Facts) -> dict[str, str]:
    """The files of the client's configuration, which a ConfigMap carries to the pods."""
    if not facts.hadoop_conf:
        return {}
    folder = Path(facts.hadoop_conf)
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*-site.xml"))}
    if absent := {"core-site.xml", "hdfs-site.xml"} - files.keys():
        raise UserError(f"hadoop_conf {folder} has no {' and no '.join(sorted(absent))}: give the client's folder")
    return files


def _config_map(facts: Facts, files: dict[str, str]) -> Manifest:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(facts, "-conf"), "data": files}


def _hadoop_conf(facts: Facts) -> list[Manifest]:
    return [_config_map(facts, _hadoop_files(facts))] if facts.hadoop_conf else []


def _spark_conf(facts: SparkFacts, scheduler: str) -> Manifest:
    """HDFS's settings, and what executors' pods have beside what Spark gives them: the same volumes and settings."""
    env = {"HADOOP_CONF_DIR": CONF, **facts.env}
    container = _container(facts, "executor", env, {}, {}, conf=True)
    for key in ("command", "workingDir", "resources"):  # Spark's
        del container[key]
    template: Manifest = {"apiVersion": "v1", "kind": "Pod", "spec": _pod_spec(facts, container, conf=True)}
    if scheduler:
        template["metadata"] = {"annotations": {"scheduling.volcano.sh/queue-name": facts.queue}}
    return _config_map(facts, {**_hadoop_files(facts), "executor.yaml": yaml.safe_dump(template, sort_keys=False)})


def render(target: str, path: str) -> str:
    """Return the manifest of `target`, for the facts in the file `path`. Raises UserError."""
    if target == "slurm-train":
        return slurm_train(load_facts(path, TrainFacts))
    if target in TRAIN:
        documents = TRAIN[target](load_facts(path, TrainFacts))
    else:
        documents = SPARK[target](load_facts(path, SparkFacts))
    return yaml.safe_dump_all(documents, sort_keys=False, width=1000)


TRAIN = {"volcano-train": volcano_train, "kubernetes-train": kubernetes_train}
SPARK = {"volcano-spark": volcano_spark, "kubernetes-spark": kubernetes_spark}
TARGETS = (*TRAIN, "slurm-train", *SPARK)


def main() -> int:
    parser = Parser(
        prog="python -m jobs.render",
        description="Print the manifest of a job for Volcano, Kubernetes or Slurm.",
        example="python -m jobs.render volcano-train jobs/facts_train.yaml | kubectl apply -f -",
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("facts", metavar="FACTS.yaml", help="as jobs/facts_train.yaml and jobs/facts_spark.yaml")
    args = parser.parse_args()
    sys.stdout.write(render(args.target, args.facts))
    return 0


if __name__ == "__main__":
    run_cli(main)
