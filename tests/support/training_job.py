"""Tiny training jobs for tests: a model folder, packed data made for it, a config, and two ways to run it."""

import json
import os
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
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder
from trainer.config import TrainConfig
from trainer.runtime import Runtime
from trainer.trainer import Run, Trainer

ROOT = Path(__file__).parents[2]
LENGTH = 64


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
    run = Run.prepare(TrainConfig(**values), world=1, cuda=torch.cuda.is_available())
    with Runtime.start(seed=run.config.seed) as runtime, Trainer(run, runtime) as trainer:
        trainer.train()
    return metrics_of(values)


def command(
    values: dict[str, Any], *changes: str, processes: int | None = None, main: str = "trainer/main.py"
) -> list[str]:
    """The command line; `processes`: as jobs/ start them; `main`: another worker than the trainer's, under torchrun."""
    remote = values["output"].startswith("hdfs://")
    config = Path(values["data"]).parent / "run.yaml" if remote else Path(values["output"]).with_suffix(".yaml")
    config.write_text(json.dumps(values))  # JSON is YAML
    arguments = [str(config), *changes]
    if processes is None:
        return [sys.executable, main, *arguments]
    options = ["--standalone", "--nproc-per-node", str(processes)]
    if main == "trainer/main.py":
        return [sys.executable, "trainer/launch.py", *options, "--", *arguments]
    return [sys.executable, "-m", "torch.distributed.run", *options, main, *arguments]


def environment(**added: str) -> dict[str, str]:
    """Of a run: processes that die are not started again, unless a test says so."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"RESTARTS": "0"} | added


def launch(
    values: dict[str, Any], *changes: str, processes: int | None = None, main: str = "trainer/main.py"
) -> "subprocess.CompletedProcess[str]":
    """The command line, to its end."""
    return subprocess.run(
        command(values, *changes, processes=processes, main=main),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def start(values: dict[str, Any], *changes: str, processes: int | None = None) -> "subprocess.Popen[str]":
    """The command line, running, its output in pipes."""
    line = command(values, *changes, processes=processes)
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: "subprocess.Popen[Any]") -> None:
    """Wait until a run has made a file."""
    end = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, "the run ended before"
        assert time.monotonic() < end
        time.sleep(0.002)


def metrics_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(values["output"], "metrics.jsonl").read_text().splitlines()]
