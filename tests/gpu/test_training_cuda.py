"""The whole Trainer on a GPU."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.training_job import train, write_job
from trainer.checkpoint.model_parts import parts_of
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.models.config import Compute
from trainer.planning import planner
from trainer.runtime import Runtime
from trainer.trainer import RUN, Run, Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextmanager
def training(values: dict[str, Any]) -> Iterator[Trainer]:
    run = Run.prepare(TrainConfig(**values), world_size=1, cuda=True)
    with Runtime.start(seed=run.config.seed) as runtime, Trainer(run, runtime) as trainer:
        yield trainer


def train_on_cpu(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Train in a process that sees no GPU."""
    script = (
        "import json, sys, tests.support.training_job as job; print(json.dumps(job.train(json.loads(sys.argv[1]))))"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", script, json.dumps(values)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return metrics


def optimizer_state(trainer: Trainer) -> dict[str, Tensor]:
    """Return the optimizer's state as a checkpoint has it."""
    parts = parts_of(trainer.model, trainer.optimizer, check=False)
    return {f"{part.key} {part.at}": part.values().clone() for part in parts if part.key.startswith("optimizer.")}


def test_trainer_follows_the_cpu(tmp_path: Any) -> None:
    """The same config on GPU and CPU: graph, Transformer Engine and bfloat16 against the reference in float32."""
    values = write_job(tmp_path, images=True)
    cuda, cpu = train(values), train_on_cpu(values | {"output": str(tmp_path / "cpu")})
    for ours, reference in zip(cuda, cpu, strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=0.01)
        assert ours["trained_tokens"] == reference["trained_tokens"]
    assert cuda[-1]["validation_loss"] == pytest.approx(cpu[-1]["validation_loss"], rel=0.01)


def test_goes_on_from_a_checkpoint_on_a_gpu_and_on_a_cpu(tmp_path: Any) -> None:
    """Master weights are stored as bfloat16 weights and what they lack; a checkpoint has them whole."""
    values = write_job(tmp_path, images=False) | {"keep_last": 2}
    elsewhere = values | {"output": str(tmp_path / "cpu")}
    whole = train(values)
    checkpoints = tmp_path / "out" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000003\n")
    shutil.rmtree(checkpoints / "step_00000006")
    shutil.copytree(values["output"], elsewhere["output"])

    states = []
    for _ in range(2):
        with training(values) as trainer:
            assert trainer.step == 3
            states.append(optimizer_state(trainer))
            trainer.save()
    for name, saved in states[0].items():
        assert torch.equal(states[1][name], saved), name
        assert saved.dtype == (torch.float32 if ".param." in name else torch.bfloat16), name
        if ".param." in name and saved.dim() > 1:
            assert (saved != saved.bfloat16().float()).float().mean() > 0.5, name

    for metrics in (train(values), train_on_cpu(elsewhere)):
        assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
        for line, expected in zip(metrics, whole, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=0.01)


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path: Any) -> None:
    values = write_job(tmp_path, images=False)
    with training(values) as trainer:
        first, second = (list(step) for step in islice(trainer.stream.batches(0), 2))
        assert math.isfinite(trainer.train_step(first, 1e-3).grad_norm)
        norm = trainer.model.language.decoder.final_layernorm.weight
        before, sound = optimizer_state(trainer), norm[3].item()
        norm.data[3] = math.inf
        assert not math.isfinite(trainer.train_step(second, 1e-3).grad_norm)
        norm.data[3] = sound
        for name, saved in optimizer_state(trainer).items():
            assert torch.equal(before[name], saved), name
        assert math.isfinite(trainer.train_step(second, 1e-3).grad_norm)
        after = optimizer_state(trainer)
        assert any(not torch.equal(before[name], after[name]) for name in after if ".param." in name)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("images", [True, False])
def test_a_step_in_fp8_computes_with_the_weights_of_the_last_one(
    images: bool, transposed: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are cast once a step. A trainer that starts from a checkpoint has cast all of them as they are there."""
    compute = Compute(fp8=True, transposed_weights=transposed)
    monkeypatch.setattr(planner.LayoutPlanner, "_computes", lambda *_, **__: [compute])
    values = write_job(tmp_path, images=images)
    with training(values) as trainer:
        steps = [list(step) for step in islice(trainer.stream.batches(0), 4)]
        first = trainer.train_step(steps[0], 1e-2).loss
        for step in steps[1:3]:
            trainer.train_step(step, 1e-2)
        trainer.step = 3
        trainer.save()
        loss, gradients = loss_and_gradients(trainer, steps[3])
    (tmp_path / "out" / RUN).touch()  # which `train` writes first
    assert abs(loss - first) > 0.01, "the weights have hardly changed, so old ones would not show"
    with training(values) as trainer:
        assert trainer.step == 3
        expected, exact = loss_and_gradients(trainer, steps[3])
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in exact.items():
        assert (gradients[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-6, name


def loss_and_gradients(trainer: Trainer, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    loss = trainer.train_step(batches, 0.0).loss
    gradients = {n: p.main_grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return loss, gradients
