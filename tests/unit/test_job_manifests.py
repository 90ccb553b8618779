"""Manifests for Kubernetes, Volcano and Slurm: jobs/render.py, by the schemas of their makers."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs.render import SPARK, TARGETS, TRAIN, render
from kanyun.errors import UserError
from tests.support.dry_run import ROOT, dry, nodes
from trainer.stopping import PREEMPTED

KUBERNETES = "1.37"
VOLCANO = yaml.safe_load((ROOT / "tests/data/volcano_job.yaml").read_text())


@pytest.fixture
def facts(tmp_path: Path) -> Callable[..., str]:
    """Writes the example's facts with changes, and returns the file."""

    def write(kind: str, **changes: Any) -> str:
        values = yaml.safe_load((ROOT / f"jobs/facts_{kind}.yaml").read_text()) | changes
        (tmp_path / "facts.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "facts.yaml")

    return write


@pytest.fixture
def conf(tmp_path: Path) -> str:
    folder = tmp_path / "conf"
    folder.mkdir()
    for name in ("core-site.xml", "hdfs-site.xml"):
        (folder / name).write_text(f"<configuration><!-- {name} --></configuration>\n")
    return str(folder)


def kind_of(target: str) -> str:
    return target.rpartition("-")[2]


def check(manifest: dict[str, Any]) -> None:
    """Raises where a manifest has a field that Kubernetes or Volcano does not know, or of another type."""
    if manifest["apiVersion"].startswith("batch.volcano.sh"):
        jsonschema.validate(manifest, VOLCANO)
        for task in manifest["spec"]["tasks"]:
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": task["template"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("target", [*TRAIN, *SPARK])
def test_manifests_follow_the_schemas(target: str, size: int, facts: Callable[..., str], conf: str) -> None:
    several = {"nodes": size, "rdma": {"rdma/hca": 8}, "host_network": True} if target in TRAIN else {"executors": size}
    manifests = list(yaml.safe_load_all(render(target, facts(kind_of(target), hadoop_conf=conf, **several))))
    for manifest in manifests:
        check(manifest)
    config_map, job = manifests[0], manifests[-1]
    assert config_map["data"]["core-site.xml"] == Path(conf, "core-site.xml").read_text()
    if target == "volcano-train":
        assert job["spec"]["minAvailable"] == job["spec"]["tasks"][0]["replicas"] == size
        assert job["spec"]["policies"][0] == {"exitCode": PREEMPTED, "action": "RestartJob"}
        assert job["spec"]["plugins"].keys() == {"env", "svc"}
    if target == "volcano-spark":
        assert "plugins" not in job["spec"], "svc would keep the executors from the driver"
    if target == "kubernetes-train":
        assert job["spec"]["completions"] == job["spec"]["parallelism"] == size
    if target in SPARK:
        template = yaml.safe_load(config_map["data"]["executor.yaml"])
        kubernetes_validate.validate(template | {"metadata": {"name": "x"}}, KUBERNETES, strict=False)


def test_a_wrong_manifest_is_found(facts: Callable[..., str]) -> None:
    job = yaml.safe_load(render("volcano-train", facts("train")))
    job["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        check(job)
    job = yaml.safe_load(render("volcano-train", facts("train")))
    job["spec"]["policies"][0]["event"] = "PodFailed"
    with pytest.raises(jsonschema.ValidationError):
        check(job)


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", one["name"].lower()) for one in container["env"]}


@pytest.mark.parametrize("target", TRAIN)
def test_a_pod_finds_its_place_by_its_manifest(target: str, facts: Callable[..., str]) -> None:
    """What the scheduler adds is as its documents say; the rest of a pod's environment is the manifest's."""
    job = list(yaml.safe_load_all(render(target, facts("train"))))[-1]
    volcano = target == "volcano-train"
    pod = (job["spec"]["tasks"][0] if volcano else job["spec"])["template"]["spec"]
    hosts = [f"qwen2-5-7b-worker-{index}.qwen2-5-7b" for index in range(8)]
    added = {"JOB_COMPLETION_INDEX": "3"}
    if volcano:
        added = {"VC_TASK_INDEX": "3", "VC_WORKER_NUM": "8", "VC_WORKER_HOSTS": ",".join(hosts)}
    container = pod["containers"][0]
    assert container["command"][:3] == ["tini", "--", "jobs/pretrain.sh"]
    found = dry(shlex.join(container["command"][2:]), environment_of(container) | added)
    first = hosts[0] if volcano else "qwen2-5-7b-0.qwen2-5-7b"
    assert f"{nodes(8, 3, first)} " in found
    assert environment_of(container)["RESTARTS"] == "0", "the scheduler starts all nodes again together"


@pytest.mark.parametrize("target", SPARK)
def test_a_driver_asks_for_its_executors(target: str, facts: Callable[..., str]) -> None:
    _, job = yaml.safe_load_all(render(target, facts("spark", executors=7)))
    pod = (job["spec"]["tasks"][0] if target == "volcano-spark" else job["spec"])["template"]["spec"]
    container = pod["containers"][0]
    found = dry(shlex.join(container["command"][2:]), environment_of(container))
    assert "--master k8s://https://kubernetes.default.svc --deploy-mode client" in found
    assert "--conf spark.executor.instances=7" in found
    assert "--conf spark.driver.host=pod_ip --conf spark.kubernetes.driver.pod.name=pod_name" in found
    assert "podTemplateFile=/opt/hadoop/conf/executor.yaml" in found
    assert ("scheduler.name=volcano" in found) == (target == "volcano-spark")
    assert found.endswith(f"{ROOT}/jobs/spark_main.py run /data/recipe.yaml")


def test_a_batch_script_passes_shellcheck(facts: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(render("slurm-train", facts("train", nodes=8)))
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, tmp_path / "job.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "#SBATCH --nodes=8\n" in (tmp_path / "job.sh").read_text()


def test_a_batch_script_has_no_config_map(facts: Callable[..., str], conf: str) -> None:
    """Nodes of Slurm read the folder itself; /opt/hadoop/conf is a pod's."""
    assert f"\nexport HADOOP_CONF_DIR={conf}\n" in render("slurm-train", facts("train", hadoop_conf=conf))


@pytest.mark.parametrize(
    ("codes", "ended", "said"),
    [
        ([0], 0, ["srun"]),
        ([137, 86, 0], 0, ["srun", "srun", "srun"]),
        ([2], 2, ["srun"]),
        ([PREEMPTED], 0, ["srun", "requeue 7"]),
    ],
)
def test_a_batch_script_starts_again_what_can_go_on(
    codes: list[int], ended: int, said: list[str], facts: Callable[..., str], tmp_path: Path
) -> None:
    """Slurm's two commands are played; the batch script is real."""
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    played = {
        "srun": 'echo srun >> said; code=$(head -n1 codes); sed -i 1d codes; exit "$code"',
        "scontrol": 'if [ "$1" = show ]; then echo n01; echo n02; else echo "$1 $2" >> said; fi',
    }
    for name, body in played.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = render("slurm-train", facts("train"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[01-02]", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == ended
    assert (tmp_path / "said").read_text().split("\n")[:-1] == said


def test_a_batch_script_hands_the_signal_on_and_queues_again(facts: Callable[..., str], tmp_path: Path) -> None:
    played = {
        "srun": "trap 'exit 85' USR1; touch started; while :; do sleep 0.05; done",
        "scontrol": 'if [ "$1" = show ]; then echo n01; else echo "$1 $2" >> said; fi',
    }
    for name, body in played.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n01", "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(["bash", "-c", render("slurm-train", facts("train"))], cwd=tmp_path, env=environment)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.send_signal(10)
    assert process.wait(20) == 0
    assert (tmp_path / "said").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"node": 2}, "has an unknown fact 'node': did you mean 'nodes'?"),
        ({"nodes": "two"}, "nodes is 'two': it should be a valid integer"),
        ({"name": "Qwen_7B"}, "name is 'Qwen_7B': it should match pattern"),
        ({"hadoop_conf": "/"}, "hadoop_conf / has no core-site.xml and no hdfs-site.xml"),
    ],
)
def test_wrong_facts_are_said_in_a_sentence(changes: dict[str, Any], sentence: str, facts: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        render("volcano-train", facts("train", **changes))


def test_facts_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"there is no {tmp_path}/facts.yaml: copy jobs/facts_train.yaml"):
        render("volcano-train", f"{tmp_path}/facts.yaml")


def test_every_target_is_rendered(facts: Callable[..., str]) -> None:
    assert all(render(target, facts(kind_of(target))) for target in TARGETS)
