"""The pipeline as `python -m pipeline run` starts it, in small tasks, some of which have an accident.

    python -m tests.support.faulty_pipeline RECIPE FOLDER [WHERE:TASK:CALL:TIMES:WHAT ...]

WHERE is preprocess, where the calls are rows, or pack, where they are packs. At call CALL of partition TASK it happens,
TIMES times in all (an accident leaves a file in FOLDER, which all processes see):
- kill       kill -9 of the executor, by which its other tasks die too
- fail       an exception
- straggle   the task goes on after five minutes
- meet       the file FOLDER/WHERE-reached appears, and the task waits for FOLDER/WHERE-go: a test does something
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pyarrow as pa
from pyspark import TaskContext, cloudpickle
from pyspark.sql import DataFrame

from kanyun.errors import run_cli
from pipeline.recipe import Recipe
from pipeline.spark import map_rows
from pipeline.stages import pack, preprocess

Rows = Iterator[pa.RecordBatch]


@dataclass(frozen=True)
class Fault:
    where: str
    task: int
    call: int
    times: int
    what: str

    @classmethod
    def parse(cls, text: str) -> "Fault":
        where, task, call, times, what = text.split(":")
        return cls(where, int(task), int(call), int(times), what)

    def happen(self, folder: Path) -> None:
        for number in range(self.times):
            try:
                (folder / f"{self.where}-{self.task}-{self.what}-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            self._happen(folder)
            return

    def _happen(self, folder: Path) -> None:
        if self.what == "kill":
            java = next(process for process in psutil.Process().parents() if "java" in process.name())
            os.kill(java.pid, signal.SIGKILL)
            time.sleep(300)
        elif self.what == "fail":
            raise RuntimeError("made to fail")
        elif self.what == "straggle":
            time.sleep(300)
        elif self.what == "meet":
            (folder / f"{self.where}-reached").touch()
            while not (folder / f"{self.where}-go").exists():
                time.sleep(0.05)


@dataclass(frozen=True)
class FaultyTask:
    """What a task runs, around the pipeline's own function."""

    function: Callable[[Rows], Rows]
    faults: tuple[Fault, ...]
    folder: Path

    def __call__(self, batches: Rows) -> Rows:
        mine = [fault for fault in self.faults if fault.task == TaskContext.get().partitionId()]
        with self._in_calls(mine):
            yield from self.function(batches)

    @contextmanager
    def _in_calls(self, faults: list[Fault]) -> Iterator[None]:
        from kanyun import writer
        from kanyun.writer import ShardWriter
        from pipeline.stages.preprocess import SampleMaker

        calls = 0

        def counted(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                nonlocal calls
                for fault in faults:
                    if fault.call == calls:
                        fault.happen(self.folder)
                calls += 1
                return method(*args)

            return call

        small = 10_000  # bytes, a few packs: files grow while there are packs to come
        with (
            patch.object(writer, "BATCH_BYTES", small),
            patch.object(SampleMaker, "__call__", counted(SampleMaker.__call__)),
            patch.object(ShardWriter, "add", counted(ShardWriter.add)),
        ):
            yield


@contextmanager
def small_tasks(folder: Path, texts: Sequence[str]) -> Iterator[None]:
    """In the block, stages of this process run in small tasks, in which the faults of `texts` happen."""
    faults = tuple(map(Fault.parse, texts))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # executors have the pipeline's code, not the tests'

    def faulty(where: str) -> Callable[[DataFrame, Callable[[Rows], Rows], pa.Schema], DataFrame]:
        mine = tuple(fault for fault in faults if fault.where == where)
        return lambda rows, function, schema: map_rows(rows, FaultyTask(function, mine, folder), schema)

    with (
        patch.object(preprocess.PreprocessStage, "task_bytes", (5000, 5000)),
        patch.object(pack.PackStage, "bucket_samples", 20),
        patch.object(preprocess, "map_rows", faulty("preprocess")),
        patch.object(pack, "map_rows", faulty("pack")),
    ):
        yield


def main() -> None:
    recipe, folder, *texts = sys.argv[1:]
    with small_tasks(Path(folder), texts):
        Recipe.load(recipe).run(overwrite=False)


if __name__ == "__main__":
    run_cli(main)
