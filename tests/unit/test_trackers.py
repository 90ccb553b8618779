"""Services beside TensorBoard: chosen by what is installed and set up, never in the way of a run."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.metrics import trackers
from trainer.metrics.trackers import SERVICES, Background, scalars_of, services

SCALARS = {"loss/train": 2.5, "loss by dataset/(other)": 3.5}


@pytest.fixture(autouse=True)
def nothing_is_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for service in SERVICES:
        for variable in service.variables:
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 300)  # a machine that is busy takes a minute to import a service
    monkeypatch.chdir(tmp_path)


def run(service: Any, said: list[str]) -> None:
    (made,) = services("runs/a", {"lr": 1e-4}, said.append)
    assert made.name == service.name
    for step in (1, 2):
        made.log(SCALARS, step)
    made.close()


def test_off_unless_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert services("runs/a", {}, print) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///nowhere")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)  # set up, but not installed
    assert services("runs/a", {}, print) == []


def test_mlflow_has_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    said: list[str] = []
    run(trackers.Mlflow, said)
    assert said == []
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("kanyun").experiment_id])
    assert (found.info.run_name, found.info.status, found.data.params["lr"]) == ("runs/a", "FINISHED", "0.0001")
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "loss/train")] == [
        (1, 2.5),
        (2, 2.5),
    ]
    assert found.data.metrics["loss by dataset/_other_"] == 3.5  # it refuses brackets


def test_weights_and_biases_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds that its process may take to start, where all are busy
    said: list[str] = []
    run(trackers.Wandb, said)
    assert said == []
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 60  # its process writes, on a busy machine after `finish` has returned
    while b"loss by dataset/(other)" not in (stored := file.read_bytes()):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert b"runs/a" in stored


def test_swanlab_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("swanlab")  # it needs an older protobuf than constraints.txt has
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    said: list[str] = []
    run(trackers.SwanLab, said)
    assert said == []
    assert list(tmp_path.glob("swanlog/run-*"))


def test_a_service_that_fails_is_said_once_and_ends_nothing() -> None:
    said: list[str] = []

    def start() -> Any:
        raise ConnectionError("no route\nto host")

    made = Background("MLflow", start, said.append)
    for step in range(3):
        made.log(SCALARS, step)
    made.close()
    assert said == ["MLflow is left out from now on (ConnectionError: no route to host); training goes on"]


def test_a_slow_service_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "WAITING", 5)
    said: list[str] = []
    seen: list[int] = []

    class Slow:
        def log(self, scalars: dict[str, float], step: int) -> None:
            time.sleep(0.02)
            seen.append(step)

        def close(self) -> None:
            pass

    made, begun = Background("slow", Slow, said.append), time.monotonic()
    for step in range(50):
        made.log(SCALARS, step)
    assert time.monotonic() - begun < 0.5
    made.close()
    assert seen == sorted(seen)
    assert said == [f"slow was too slow for {50 - len(seen)} steps: metrics.jsonl has them"]


def test_scalars_are_the_line_in_groups() -> None:
    line = json.loads(
        '{"step": 3, "steps": 9, "loss": 2.0, "lr": 0.1, "grad_norm": null, "skipped": 1, "trained_tokens": 7, '
        '"tokens_per_second": 8.0, "mfu": null, "data_wait": 0.0, "imbalance": 1.0, '
        '"work_seconds": 1.0, "work_seconds_mean": 1.0, "seconds": 2.0, "memory_gb": 1.0, '
        '"validation_loss": null, "events": ["save"], "loss_by_dataset": {"a/b": 2.0, "c": null}, '
        '"tokens_by_dataset": {"a/b": 7}, "validation_loss_by_dataset": {}}'
    )
    found = scalars_of(line)
    assert found["loss/train"] == found["loss by dataset/a/b"] == 2.0
    assert found["trained tokens by dataset/a/b"] == 7
    assert not {"optimizer/grad_norm", "speed/mfu", "loss/held-out", "loss by dataset/c"} & found.keys()
    assert len(found) == 13
