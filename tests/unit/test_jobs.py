"""The scripts of jobs/: what they would run, here and on each kind of cluster; manifests and their schemas; recipes."""

import os
import re
import shlex
import shutil
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
from trainer.config import load_config
from trainer.models.registry import published_sizes
from trainer.stopping import PREEMPTED

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.37"
VOLCANO = yaml.safe_load((ROOT / "tests/data/volcano_job.yaml").read_text())
SCRIPTS = sorted([*ROOT.glob("jobs/*.sh"), *ROOT.glob("docker/*.sh"), ROOT / ".ci/run"])
PYTHON = "/venv/bin/python"
SUBMIT = f"env PYSPARK_PYTHON={{worker}} PYSPARK_DRIVER_PYTHON={PYTHON} PYTHONPATH={ROOT} /venv/bin/spark-submit"
LAUNCH = f"{PYTHON} {ROOT}/trainer/launch.py"


def dry(command: str, environment: dict[str, str] | None = None, code: int = 0) -> str:
    """What a script prints with DRY_RUN=1, in an environment of these variables alone."""
    fixed = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "PYTHON": PYTHON, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        shlex.split(command), env=fixed | (environment or {}), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return (done.stdout if code == 0 else done.stderr).strip()


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(script: Path) -> None:
    assert "\nset -euo pipefail\n" in script.read_text()


USED = [path for path in ROOT.glob("jobs/*.sh") if path.stem not in ("common", "setup", "setup_gpu", "demo")]


@pytest.mark.parametrize("script", USED, ids=lambda path: path.stem)
def test_help_shows_usage_and_an_example(script: Path) -> None:
    lines = dry(f"{script} --help").splitlines()
    usage = next(line for line in lines if line.startswith(f"usage: jobs/{script.name} "))
    assert re.match(rf"example: .*jobs/{script.name} ", lines[lines.index(usage) + 1])
    assert not any(line.startswith(("#", "set ", "source ")) for line in lines)
    assert dry(str(script), code=2) == usage


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "jobs/spark_preprocess.sh raw 'work/a b' --dataset llava",
            "-m pipeline preprocess raw work/a\\ b --dataset llava",
        ),
        ("jobs/spark_filter.sh a b", "-m pipeline filter a b"),
        ("jobs/spark_sample.sh a b --epoch 1", "-m pipeline sample a b --epoch 1"),
        (
            "jobs/spark_build_dataset.sh a b --tokenizer hf --length 8192",
            "-m pipeline build a b --tokenizer hf --length 8192",
        ),
        ("jobs/spark_packing.sh a b --length 8192", "-m pipeline pack a b --length 8192"),
        ("jobs/spark_run.sh recipe.yaml", "-m pipeline run recipe.yaml"),
        ("jobs/convert_to_megatron.sh hf out", "-m convert to-megatron hf out"),
        ("jobs/convert_to_huggingface.sh run hf --overwrite", "-m convert to-hf run hf --overwrite"),
    ],
)
def test_here_a_script_runs_python(command: str, expected: str) -> None:
    assert dry(command) == f"{PYTHON} {expected}"


def test_sparks_own_master_takes_the_same_command() -> None:
    assert dry("jobs/spark_filter.sh a b", {"SPARK_MASTER": "spark://m:7077"}) == f"{PYTHON} -m pipeline filter a b"


@pytest.mark.parametrize(
    ("environment", "worker", "options"),
    [
        (
            {"SPARK_MASTER": "spark://m:7077", "SPARK_ENV": "env.tar.gz"},
            "./environment/bin/python",
            "--master spark://m:7077 --archives env.tar.gz#environment",
        ),
        (
            {"SPARK_MASTER": "yarn", "SPARK_ENV": "e.tar.gz", "SPARK_SUBMIT_OPTIONS": "--queue etl --num-executors 4"},
            "./environment/bin/python",
            "--master yarn --deploy-mode client --conf spark.executor.memoryOverheadFactor=1.0 "
            "--archives e.tar.gz#environment --queue etl --num-executors 4",
        ),
        (
            {"SPARK_MASTER": "k8s://https://k:6443", "SPARK_IMAGE": "r/p:1", "POD_NAME": "d", "POD_IP": "10.0.0.7"},
            "python3",
            "--master k8s://https://k:6443 --deploy-mode client --conf spark.executor.memoryOverheadFactor=1.0 "
            "--conf spark.kubernetes.container.image=r/p:1 --conf spark.kubernetes.namespace=default "
            "--conf spark.driver.host=10.0.0.7 --conf spark.kubernetes.driver.pod.name=d",
        ),
    ],
)
def test_on_a_cluster_code_and_packages_go_along(environment: dict[str, str], worker: str, options: str) -> None:
    expected = f"{SUBMIT.format(worker=worker)} {options} {ROOT}/jobs/spark_main.py pack a b --length 64"
    assert dry("jobs/spark_packing.sh a b --length 64", environment).replace("\\#", "#") == expected


def test_kubernetes_needs_an_image() -> None:
    assert "SPARK_IMAGE: is not set: the image of docker/Dockerfile.pipeline" in dry(
        "jobs/spark_filter.sh a b", {"SPARK_MASTER": "k8s://https://k:6443"}, code=1
    )


def test_an_environment_is_packed_with_the_pinned_versions(tmp_path: Path) -> None:
    venv, install, pack = dry(f"jobs/pack_env.sh {tmp_path}/env.tar.gz").split(" && ")
    assert venv == f"{PYTHON} -m venv ENV"
    assert install == f"ENV/bin/python -m pip install -c {ROOT}/constraints.txt {ROOT}\\[pipeline\\]"
    assert pack == f"{PYTHON} -m venv_pack --prefix ENV --output {tmp_path}/env.tar.gz --force"


def test_a_bare_machine_says_all_that_is_missing(tmp_path: Path) -> None:
    """A PATH with the shell's tools and neither Python nor Java; HOME has no pyenv."""
    for tool in ("bash", "dirname", "id", "sed", "grep"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([tmp_path / "bash", ROOT / "jobs/setup.sh"], env=bare, capture_output=True, text=True)
    python, java = done.stderr.splitlines()
    assert done.returncode == 2
    assert python.startswith("Python 3.12 or 3.13 with venv is missing: install one")
    assert java.startswith("Java 17 or 21 is missing, which Spark needs; there is none: install it")


# --- training


def nodes(count: int, rank: int, first: str, port: int = 29500) -> str:
    return f"--nnodes {count} --node-rank {rank} --master-addr {first} --master-port {port}"


@pytest.mark.parametrize("script", ["pretrain", "train_vision"])
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "--standalone"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "h0", "MASTER_PORT": "7"}, nodes(2, 1, "h0", 7)),
        (
            {"VC_TASK_INDEX": "1", "VC_WORKER_NUM": "3", "VC_WORKER_HOSTS": "j-worker-0.j,j-worker-1.j,j-worker-2.j"},
            nodes(3, 1, "j-worker-0.j"),
        ),
        ({"VC_TASK_INDEX": "0", "VC_WORKER_NUM": "1", "VC_WORKER_HOSTS": "j-worker-0.j"}, "--standalone"),
        ({"JOB_COMPLETION_INDEX": "2", "NNODES": "4", "MASTER_ADDR": "j-0.j"}, nodes(4, 2, "j-0.j")),
        ({"SLURM_NODEID": "1", "SLURM_NNODES": "2", "MASTER_ADDR": "n07"}, nodes(2, 1, "n07")),
    ],
)
def test_each_scheduler_says_who_is_who(script: str, environment: dict[str, str], expected: str) -> None:
    found = dry(f"jobs/{script}.sh c.yaml lr=1e-5", environment)
    assert found == f"{LAUNCH} {expected} --nproc-per-node 1 -- c.yaml lr=1e-5"


def test_a_node_without_a_rank_is_refused() -> None:
    assert "NODE_RANK: is not set: 0 on the node of MASTER_ADDR" in dry(
        "jobs/pretrain.sh c.yaml", {"NNODES": "2"}, code=1
    )


def test_a_node_with_gpus_has_a_process_for_each(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert "--nproc-per-node gpu " in dry("jobs/pretrain.sh c.yaml", path)
    assert "--nproc-per-node 3 " in dry("jobs/pretrain.sh c.yaml", path | {"NPROC": "3"})


# --- manifests


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


def test_every_target_is_rendered(facts: Callable[..., str]) -> None:
    assert all(render(target, facts(kind_of(target))) for target in TARGETS)


# --- recipes


def recipe_of(model: str) -> Path:
    return ROOT / "jobs/recipes" / f"{re.sub('[-.]', '_', model.lower())}.yaml"


@pytest.mark.parametrize("model", published_sizes())
def test_every_size_of_every_family_has_a_recipe(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(str(recipe_of(model)), [])
    assert config.model.startswith(f"models/{model}")
    assert config.output == f"runs/{recipe_of(model).stem}"
    assert config.init == f"checkpoints/{recipe_of(model).stem}"
    assert config.length == 8192


def test_scripts_named_by_recipes_exist() -> None:
    for recipe in ROOT.glob("jobs/recipes/*.yaml"):
        for script in re.findall(r"jobs/\w+\.sh", recipe.read_text()):
            assert os.access(ROOT / script, os.X_OK)
