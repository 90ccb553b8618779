"""Pods of a job on Kubernetes, in the images of docker/: their container, its volumes and the configuration in it."""

from pathlib import Path
from typing import Any

import yaml

from jobs.facts import Facts, SparkFacts, TrainFacts
from kanyun.errors import UserError

ROOT = "/opt/kanyun"  # of the images
USER = 10001  # of the images
CONF = "/opt/hadoop/conf"
Manifest = dict[str, Any]


def metadata(facts: Facts, suffix: str = "") -> Manifest:
    return {"name": facts.name + suffix, "namespace": facts.namespace}


def train_env(facts: TrainFacts, conf: str = CONF) -> dict[str, str]:
    """`conf`: where the job finds the files of `hadoop_conf`."""
    # The scheduler starts all nodes again together: one that started its ranks alone would wait for the others.
    restarts = {"RESTARTS": "0"} if facts.nodes > 1 else {}
    hadoop = {"HADOOP_CONF_DIR": conf} if facts.hadoop_conf else {}
    return {**restarts, **hadoop, **facts.env}


def training_pod(facts: TrainFacts, env: dict[str, str]) -> Manifest:
    resources = {
        "cpu": facts.cpus,
        "memory": facts.memory,
        "nvidia.com/gpu": facts.gpus,
        **facts.rdma,
    }
    capabilities = {"capabilities": {"add": ["IPC_LOCK"]}} if facts.rdma else {}  # RDMA pins its buffers
    container = _container(facts, "train", {**env, **train_env(facts)}, resources, capabilities)
    container["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    spec = _pod_spec(facts, container)
    memory = {"emptyDir": {"medium": "Memory", "sizeLimit": facts.shared_memory}}
    spec["volumes"].append({"name": "shared-memory", **memory})
    spec["terminationGracePeriodSeconds"] = facts.grace_seconds
    if facts.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return {"spec": spec}


def driver_pod(facts: SparkFacts, scheduler: str) -> Manifest:
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
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(facts, "-conf"), "data": files}


def hadoop_conf(facts: Facts) -> list[Manifest]:
    return [_config_map(facts, _hadoop_files(facts))] if facts.hadoop_conf else []


def spark_conf(facts: SparkFacts, scheduler: str) -> Manifest:
    """HDFS's settings, and what executors' pods have beside what Spark gives them: the same volumes and settings."""
    env = {"HADOOP_CONF_DIR": CONF, **facts.env}
    container = _container(facts, "executor", env, {}, {}, conf=True)
    for key in ("command", "workingDir", "resources"):  # Spark's
        del container[key]
    template: Manifest = {"apiVersion": "v1", "kind": "Pod", "spec": _pod_spec(facts, container, conf=True)}
    if scheduler:
        template["metadata"] = {"annotations": {"scheduling.volcano.sh/queue-name": facts.queue}}
    return _config_map(facts, {**_hadoop_files(facts), "executor.yaml": yaml.safe_dump(template, sort_keys=False)})
