"""Where the numbers of a step go besides metrics.jsonl: TensorBoard always, other services where they are set up.

A service is used if its package is installed and one of its own environment variables is set; nothing is to be
configured here. Each has a thread: training never waits for a service, and none ends a run. What fails is said once.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from queue import Full, Queue
from typing import Any, Protocol

from trainer.metrics.appended import AppendedFile

# Names in a line of metrics.jsonl -> group and name of a chart.
SCALARS = {
    "loss": "loss/train",
    "validation_loss": "loss/held-out",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "skipped": "optimizer/skipped",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "seconds": "speed/seconds",
    "data_wait": "speed/data_wait",
    "imbalance": "speed/imbalance",
    "work_seconds": "speed/slowest_rank_seconds",
    "work_seconds_mean": "speed/mean_rank_seconds",
    "memory_gb": "memory/peak_gb",
    "trained_tokens": "data/trained_tokens",
}
BY_DATASET = {
    "loss_by_dataset": "loss by dataset",
    "validation_loss_by_dataset": "held-out loss by dataset",
    "tokens_by_dataset": "trained tokens by dataset",
}
WAITING = 1000  # steps that wait for a slow service; further ones are left out
CLOSE_SECONDS = 60  # that the end of a run waits for them


class Tracker(Protocol):
    """Keeps scalars by name and step."""

    def log(self, scalars: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def scalars_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl, by group and name; those that are null are left out."""
    scalars = {chart: line[name] for name, chart in SCALARS.items()}
    scalars |= {
        f"{group}/{dataset}": line[name][dataset] for name, group in BY_DATASET.items() for dataset in line[name]
    }
    return {chart: value for chart, value in scalars.items() if value is not None}


class TensorBoard:
    """FOLDER/tensorboard; a run that resumes at step `start` hides what was written of later steps.

    tensorboard's own writer has a thread, which prints a traceback and ends where a disk refuses.
    """

    def __init__(self, folder: Path, start: int, say: Callable[[str], None], owns: Callable[[], bool]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # 0.3 s: other ranks need not
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._event, self._summary, self._say = Event, Summary, say
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / "tensorboard" / name, owns)
        self._write(file_version="brain.Event:2", step=start + 1)
        self._write(session_log=SessionLog(status=SessionLog.START), step=start + 1)

    def log(self, scalars: dict[str, float], step: int) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(summary=self._summary(value=values), step=step)

    def close(self) -> None:
        if lost := self._file.close():
            self._say(lost)

    def _write(self, **values: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = BytesIO()
        RecordWriter(record).write(self._event(wall_time=time.time(), **values).SerializeToString())
        self._file.write(record.getvalue())  # where its disk refuses, metrics.jsonl says so


class Wandb:
    """Weights & Biases."""

    name, package, variables = "Weights & Biases", "wandb", ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE")

    def __init__(self, run: str, config: dict[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "kanyun")
        self._run = wandb.init(project=project, name=run, config=config, settings=wandb.Settings(console="off"))

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow."""

    name, package, variables = "MLflow", "mlflow", ("MLFLOW_TRACKING_URI",)

    def __init__(self, run: str, config: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "kanyun")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = self._client.create_run(number, run_name=run).info.run_id
        for key, value in config.items():
            self._client.log_param(self._run, key, value)

    def log(self, scalars: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        # It refuses names with other characters.
        metrics = [Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class SwanLab:
    """SwanLab."""

    name, package, variables = "SwanLab", "swanlab", ("SWANLAB_API_KEY", "SWANLAB_PROJ_NAME", "SWANLAB_MODE")

    def __init__(self, run: str, config: dict[str, Any]) -> None:
        import swanlab

        project = os.environ.get("SWANLAB_PROJ_NAME", "kanyun")
        self._run = swanlab.init(project=project, experiment_name=run, config=config)

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


SERVICES: tuple[Any, ...] = (Wandb, Mlflow, SwanLab)


class Background:
    """A service that is started and fed in a separate thread."""

    def __init__(self, name: str, start: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self.name, self._start, self._say = name, start, say
        self._queue: Queue[tuple[dict[str, float], int] | None] = Queue(WAITING)
        self._left_out = 0
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def log(self, scalars: dict[str, float], step: int) -> None:
        try:
            self._queue.put_nowait((scalars, step))
        except Full:
            self._left_out += 1

    def close(self) -> None:
        with suppress(Full):
            self._queue.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._say(f"{self.name} did not take all numbers within {CLOSE_SECONDS} s: metrics.jsonl has them")
        elif self._left_out and not self._failed:
            self._say(f"{self.name} was too slow for {self._left_out} steps: metrics.jsonl has them")

    def _run(self) -> None:
        try:
            tracker = self._start()
            while item := self._queue.get():
                tracker.log(*item)
            tracker.close()
        except Exception as error:  # a service raises what it likes
            self._failed = True
            reason = " ".join(str(error).split())[:300]
            self._say(f"{self.name} is left out from now on ({type(error).__name__}: {reason}); training goes on")
            while self._queue.get():
                pass


def services(run: str, config: dict[str, Any], say: Callable[[str], None]) -> list[Background]:
    """Return the services that are installed and set up in the environment, each with a new run of this name."""
    started = []
    for service in SERVICES:
        if any(os.environ.get(variable) for variable in service.variables) and find_spec(service.package):
            started.append(Background(service.name, partial(service, run, config), say))
    return started
