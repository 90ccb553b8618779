"""The scripts of jobs/: what they would run, here and on each kind of cluster; recipes."""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.dry_run import PYTHON, ROOT, dry, nodes
from trainer.config import load_config
from trainer.models.registry import published_sizes

SCRIPTS = sorted([*ROOT.glob("jobs/*.sh"), *ROOT.glob("docker/*.sh"), ROOT / ".ci/run"])
SUBMIT = f"env PYSPARK_PYTHON={{worker}} PYSPARK_DRIVER_PYTHON={PYTHON} PYTHONPATH={ROOT} /venv/bin/spark-submit"
LAUNCH = f"{PYTHON} {ROOT}/trainer/launch.py"


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(script: Path) -> None:
    assert "\nset -euo pipefail\n" in script.read_text()


USED = [path for path in ROOT.glob("jobs/*.sh") if path.stem != "common"]
WITHOUT_ARGUMENTS = ("setup", "setup_gpu", "demo")


@pytest.mark.parametrize("script", USED, ids=lambda path: path.stem)
def test_help_shows_usage_and_an_example(script: Path) -> None:
    lines = dry(f"{script} --help").splitlines()
    usage = next(line for line in lines if re.match(rf"usage: jobs/{script.name}\b", line))
    assert re.match(rf"example: .*jobs/{script.name}\b", lines[lines.index(usage) + 1])
    assert not any(line.startswith(("#", "set ", "source ")) for line in lines)
    if script.stem not in WITHOUT_ARGUMENTS:
        assert dry(str(script), code=2) == usage


def options(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", text))


@pytest.mark.parametrize(
    ("script", "module", "command"),
    [
        ("spark_preprocess", "pipeline", "preprocess"),
        ("spark_filter", "pipeline", "filter"),
        ("spark_sample", "pipeline", "sample"),
        ("spark_build_dataset", "pipeline", "build"),
        ("spark_packing", "pipeline", "pack"),
        ("spark_run", "pipeline", "run"),
        ("convert_to_megatron", "convert", "to-megatron"),
        ("convert_to_huggingface", "convert", "to-hf"),
    ],
)
def test_usage_names_every_option_of_the_command(script: str, module: str, command: str) -> None:
    top = importlib.import_module(f"{module}.__main__").parser()
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    usage = next(line for line in dry(f"jobs/{script}.sh --help").splitlines() if line.startswith("usage: "))
    assert options(usage) == options(commands.choices[command].format_usage())


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
    options = f"--prefix ENV --output {tmp_path}/env.tar.gz --exclude \\*/pyspark/jars/\\* --force --quiet"
    assert pack == f"{PYTHON} -m venv_pack {options}"


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


def test_set_up_prints_what_it_would_install(tmp_path: Path) -> None:
    (tmp_path / "python3.12").write_text("#!/bin/sh\necho Python 3.12.9\n")
    (tmp_path / "java").write_text("#!/bin/sh\necho 'openjdk version \"21.0.1\"' >&2\n")
    for tool in tmp_path.iterdir():
        tool.chmod(0o755)
    *_, install = dry("jobs/setup.sh", {"PATH": f"{tmp_path}:/usr/bin:/bin"}).splitlines()
    assert install.strip() == (
        ".venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e .\\[dev\\]"
    )


def test_set_up_for_a_gpu_prints_what_it_would_install() -> None:
    build, engine = dry("jobs/setup_gpu.sh", {"PYTHON": sys.executable}).splitlines()
    pip = f"{sys.executable} -m pip install --disable-pip-version-check -c constraints.txt"
    assert build.startswith(f"{pip} ninja ")
    assert engine.startswith(f"env NVTE_BUILD_USE_NVIDIA_WHEELS=1 {pip} --no-build-isolation transformer-engine")


@pytest.mark.parametrize(("argument", "family"), [("", "qwen2_5_vl"), ("qwen3_vl", "qwen3_vl")])
def test_the_demo_prints_its_commands(argument: str, family: str) -> None:
    lines = [line.strip() for line in dry(f"jobs/demo.sh {argument}").splitlines()]
    assert lines == [
        "rm -rf demo",
        f"{PYTHON} jobs/demo/make_raw.py demo",
        f"{PYTHON} jobs/demo/make_model.py demo/raw demo/model {family}",
        f"{PYTHON} -m pipeline run jobs/recipes/demo.yaml",
        f"{PYTHON} -m pipeline run jobs/recipes/demo_validation.yaml",
        f"{PYTHON} -m kanyun verify demo/pipeline/packed",
        f"{PYTHON} -m kanyun info demo/pipeline/packed",
        f"{PYTHON} -m kanyun preview demo/pipeline/packed demo/preview.html",
        "jobs/train_vision.sh jobs/recipes/demo_train.yaml",
        f"{PYTHON} -m convert to-hf demo/train demo/hf",
        f"{PYTHON} jobs/demo/score.py demo/hf demo/heldout/digits demo/score.json",
        f"{PYTHON} jobs/demo/result.py demo",
    ]
    assert dry("jobs/demo.sh qwen9", code=2).startswith("usage: jobs/demo.sh [FAMILY]")


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
