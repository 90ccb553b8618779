"""Manifests of jobs for a cluster, rendered from a few facts: python -m jobs.render TARGET FACTS.yaml > manifest.

Targets: volcano-train, kubernetes-train, slurm-train (facts as in jobs/facts_train.yaml), volcano-spark and
kubernetes-spark (jobs/facts_spark.yaml). All of them run the scripts beside this file, in the images of docker/. How a
job is started again: after exit code 85 (told to stop, and saved), after a lost pod or node, and after a rank that died
or hung; never after 2 (wrong input).
"""

import shlex
import sys
from pathlib import Path

import yaml

from jobs.facts import Facts, SparkFacts, TrainFacts, load_facts
from jobs.pods import Manifest, driver_pod, hadoop_conf, metadata, spark_conf, train_env, training_pod
from kanyun.cli.parser import Parser
from kanyun.errors import run_cli
from trainer.stopping import PREEMPTED

WRONG_INPUT = 2
MOST_RESTARTS = 100  # each preemption is one
MASTER_PORT = 29500


def volcano_train(facts: TrainFacts) -> list[Manifest]:
    """One task, worker: all pods at once or none; plugins give each its number and the name of the first."""
    pod = training_pod(facts, {"MASTER_PORT": str(MASTER_PORT)})
    policies: list[Manifest] = [
        {"exitCode": PREEMPTED, "action": "RestartJob"},
        {"exitCode": WRONG_INPUT, "action": "TerminateJob"},
        {"events": ["PodFailed", "PodEvicted"], "action": "RestartJob"},
        {"event": "TaskCompleted", "action": "CompleteJob"},
    ]
    job = _volcano(facts, "worker", facts.nodes, pod, policies, MOST_RESTARTS)
    # svc gives the pods names, and a network policy by which they hear only one another.
    job["spec"]["plugins"] = {"env": [], "svc": ["--publish-not-ready-addresses=true"]}
    return [*hadoop_conf(facts), job]


def kubernetes_train(facts: TrainFacts) -> list[Manifest]:
    """An indexed Job and its names. A lost pod alone is started again: the others notice after `hang_after`, exit with
    86, and are started again, too. Volcano restarts all of them at once.
    """
    first = f"{facts.name}-0.{facts.name}"
    pod = training_pod(facts, {"NNODES": str(facts.nodes), "MASTER_ADDR": first, "MASTER_PORT": str(MASTER_PORT)})
    pod["spec"]["subdomain"] = facts.name
    labels = {"app": facts.name}
    pod["metadata"] = {"labels": labels}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(facts),
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
    return [*hadoop_conf(facts), service, _job(facts, spec)]


def volcano_spark(facts: SparkFacts) -> list[Manifest]:
    """The driver's pod; executors are pods that it makes, and Volcano places as it does the driver."""
    pod = driver_pod(facts, scheduler="volcano")
    policies: list[Manifest] = [
        {"exitCode": WRONG_INPUT, "action": "TerminateJob"},
        {"events": ["PodFailed", "PodEvicted"], "action": "RestartJob"},
        {"event": "TaskCompleted", "action": "CompleteJob"},
    ]
    return [spark_conf(facts, "volcano"), _volcano(facts, "driver", 1, pod, policies, 3)]


def kubernetes_spark(facts: SparkFacts) -> list[Manifest]:
    """The driver's pod as a Job: what is finished is skipped, so it may be started again."""
    rules = [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [WRONG_INPUT]}}]
    spec = {"backoffLimit": 3, "podFailurePolicy": {"rules": rules}, "template": driver_pod(facts, scheduler="")}
    return [spark_conf(facts, ""), _job(facts, spec)]


def slurm_train(facts: TrainFacts) -> str:
    """A batch script. Its time limit sends USR1 early enough for a save; then the job is queued again."""
    settings = {"MASTER_PORT": str(MASTER_PORT), **train_env(facts, str(Path(facts.hadoop_conf).absolute()))}
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
set -euo pipefail
{exports}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR
for _ in {{1..{MOST_RESTARTS}}}; do
  # A rank that fails ends the step on all nodes; the next step goes on from the last checkpoint.
  srun --kill-on-bad-exit=1 {shlex.join(facts.command)} &
  step=$! told=1 code=0
  trap 'kill -USR1 "$step" || true; told=1' USR1 TERM
  while ((told)); do # a signal, which srun hands on to the ranks, ends the wait before the step
    told=0 ended=0
    wait "$step" || ended=$?
    ((ended == 127)) || code=$ended
  done
  case $code in
    0 | {WRONG_INPUT}) exit "$code" ;;
    {PREEMPTED}) exec scontrol requeue "$SLURM_JOB_ID" ;;
  esac
done
exit "$code"
"""


def _job(facts: Facts, spec: Manifest) -> Manifest:
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata(facts), "spec": spec}


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
    return {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "metadata": metadata(facts), "spec": spec}


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
