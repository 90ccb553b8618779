"""Tiny training jobs for tests: a model folder, packed data made for it, a config, and two ways to run it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from tests.support.packed_data import IMAGE, random_packs, write_packed
from tests.support.processes import ROOT, Python, run_python
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder
from trainer.config import TrainConfig
from trainer.runtime import Runtime
from trainer.trainer import Run, Trainer

LENGTH = 64
WHOLE_STEPS = 8  # of the fixture text_run


def write_job(
    folder: Path, *, images: bool, packs: int = 16, make_model: Callable[[Path], Path] | None = None
) -> dict[str, Any]:
    """Write folder/{hf,data,held_out}; return the values of a config that trains there, into folder/out.

    `make_model` writes the Hugging Face folder; None: a tiny Qwen2.5, or Qwen2.5-VL with `images`.
    """
    hf = (make_model or (tiny_vl_folder if images else tiny_text_folder))(folder / "hf")
    config = json.loads((hf / "config.json").read_text())
    text = config.get("text_config", config)
    text["vocab_size"] = IMAGE + 3  # the token ids of tests.support.packed_data
    if images:
        config["image_token_id"] = IMAGE
    (hf / "config.json").write_text(json.dumps(config))
    tokenizer = fingerprint(Folder(str(hf))).digest
    write_packed(folder / "data", random_packs(1, packs, LENGTH, images), LENGTH, tokenizer=tokenizer)
    write_packed(folder / "held_out", random_packs(2, 5, LENGTH, images), LENGTH, tokenizer=tokenizer)
    return {
        "model": str(hf),
        "data": str(folder / "data"),
        "validation": str(folder / "held_out"),
        "output": str(folder / "out"),
        "length": LENGTH,
        "global_batch": 4,
        "steps": 6,
        "lr": 3e-3,
        "warmup_steps": 2,
        "save_every": 3,
        "validate_every": 3,
    }


def train(values: dict[str, Any]) -> list[dict[str, Any]]:
    """A run in this process; returns its metrics."""
    run = Run.prepare(TrainConfig(**values), world_size=1, cuda=torch.cuda.is_available())
    start = Runtime.start(seed=run.config.seed, deterministic=run.config.deterministic)
    with start as runtime, Trainer(run, runtime) as trainer:
        trainer.train()
    return metrics_of(values)


def command(values: dict[str, Any], *changes: str, processes: int | None = None) -> list[str]:
    """Write the run's YAML file; return the command line behind `python`. `processes`: as the scripts of jobs/ start
    several ranks."""
    remote = values["output"].startswith("hdfs://")
    config = Path(values["data"]).parent / "run.yaml" if remote else Path(values["output"]).with_suffix(".yaml")
    config.write_text(json.dumps(values))  # JSON is YAML
    if processes is None:
        return ["trainer/main.py", str(config), *changes]
    return ["trainer/launch.py", "--standalone", "--nproc-per-node", str(processes), "--", str(config), *changes]


def environment(**added: str) -> dict[str, str]:
    """Return the environment of a run: processes that die are not started again, unless a test says so."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"RESTARTS": "0"} | added


def execute(values: dict[str, Any], *changes: str, processes: int | None = None) -> "subprocess.CompletedProcess[str]":
    """The command line as people start it, to its end: every process imports torch for itself."""
    line = [sys.executable, *command(values, *changes, processes=processes)]
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def launch(values: dict[str, Any], *changes: str, processes: int | None = None) -> "subprocess.CompletedProcess[str]":
    """The command line in forked processes, to its end."""
    return run_python(command(values, *changes, processes=processes), environment())


def start(values: dict[str, Any], *changes: str, processes: int | None = None) -> Python:
    """The command line in forked processes, running."""
    return Python(command(values, *changes, processes=processes), environment())


def wait_for(path: Path, process: Python) -> None:
    """Wait until a run has made a file."""
    end = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, "the run ended before"
        assert time.monotonic() < end
        time.sleep(0.002)


def metrics_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(values["output"], "metrics.jsonl").read_text().splitlines()]


def curve(values: dict[str, Any], name: str = "loss") -> list[float]:
    """A metric of every step, each of which must be there once."""
    metrics = metrics_of(values)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    return [line[name] for line in metrics]


def steps_of(values: dict[str, Any]) -> list[str]:
    """The names of a run's checkpoints."""
    return [path.name for path in sorted(Path(values["output"], "checkpoints").glob("step_*"))]


def copy_of(finished: dict[str, Any], job: dict[str, Any]) -> Path:
    """Copy a finished run to the job's output; return its checkpoints."""
    shutil.copytree(finished["output"], job["output"])
    return Path(job["output"], "checkpoints")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
