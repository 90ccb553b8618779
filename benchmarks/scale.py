"""The five stages over generated rows: time, tasks, shuffle bytes and memory, beside the formulas of docs/scale.md.

Half of --rows are documents (ratio 0.7), half chats (ratio 1.4); --images are rows with a small picture (ratio 0.5).
Each stage is its own command (python -m pipeline), so that its memory is its own: the highest resident size (VmHWM)
of the driver's Python, of the JVM and of the largest Python worker. CPU seconds are those of all its processes, seen
every half second. Tasks and shuffle bytes come from Spark's event log; tasks are those of the Spark stage with most.
A figure more than 20 % off its formula is marked. In a FOLDER that is named, a step that has been measured is not
run again, so that a run of hours can be stopped, or made with --steps in parts. What a step has read is deleted.

usage: python -m benchmarks.scale --rows N --images N [--cores N] [--steps N] [FOLDER]     (8 kB of disk a row)
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import yaml

from benchmarks.scale_data import write_raw
from kanyun.cli.parser import Parser
from kanyun.manifest import Manifest
from kanyun.storage import Folder
from pipeline.reports.report import Report
from pipeline.stages.base import SHUFFLE_PARTITIONS, SHUFFLE_ROWS
from tests.support.qwen_assets import real_tokenizer_folder

LENGTH = 8192
DATASETS = {"documents": "text", "chats": "messages", "pictures": "messages"}  # data path -> dataset class
RATIOS = {"documents": 0.7, "chats": 1.4, "pictures": 0.5}
COLUMNS = (
    "stage | rows | s | CPU s, of the JVM | tasks / formula | shuffle, MB / formula | driver, MB / formula | JVM, MB | "
    "worker, MB / formula"
)
LOOK_SECONDS = 0.5
LOG_SECONDS = 120  # the JVM finishes its event log after the driver's Python has ended


@dataclass(frozen=True)
class Use:
    """Resources of a stage, measured or by formula; 0 = none, or no formula."""

    tasks: float = 0.0
    shuffle: float = 0.0  # bytes written
    worker: float = 0.0  # bytes resident of the largest Python worker, at most
    driver: float = 0.0  # of the driver's Python
    jvm: float = 0.0
    seconds: float = 0.0  # of the whole command
    cpu: float = 0.0  # seconds, of all its processes
    jvm_cpu: float = 0.0  # of them, the JVM's


def run_stage(arguments: Sequence[str], logs: Path, environment: dict[str, str]) -> Use:
    """Run `python -m pipeline ARGUMENTS` and measure it. Raises SystemExit if it fails."""
    started, watch = time.time(), _Watch()
    with subprocess.Popen([sys.executable, "-m", "pipeline", *arguments], env=environment) as process:
        while process.poll() is None:
            watch.look(process.pid)
            time.sleep(LOOK_SECONDS)
    if process.returncode:
        raise SystemExit(f"pipeline {' '.join(arguments)} ended with {process.returncode}: see above")
    seconds = time.time() - started
    tasks, shuffle = read_log(_finished_log(logs))
    return Use(
        tasks=tasks,
        shuffle=shuffle,
        worker=watch.peaks["worker"],
        driver=watch.peaks["driver"],
        jvm=watch.peaks["jvm"],
        seconds=seconds,
        cpu=sum(watch.cpu.values()),
        jvm_cpu=sum(watch.cpu[process] for process in watch.jvms),
    )


class _Watch:
    """Highest resident bytes by kind of process, and CPU seconds of each process, of a command that runs."""

    def __init__(self) -> None:
        self.peaks = {"driver": 0, "jvm": 0, "worker": 0}
        self.cpu: dict[psutil.Process, float] = {}
        self.jvms: set[psutil.Process] = set()

    def look(self, driver: int) -> None:
        try:
            processes = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
        except psutil.Error:
            return
        for process in processes:
            try:
                times, name = process.cpu_times(), process.name()
                status = Path(f"/proc/{process.pid}/status").read_text()
            except (psutil.Error, OSError):
                continue  # it has ended
            self.cpu[process] = times.user + times.system
            kind = "driver" if process.pid == driver else "jvm" if name == "java" else "worker"
            if kind == "jvm":
                self.jvms.add(process)
            if kind != "worker" or name.startswith("python"):
                for line in status.splitlines():
                    if line.startswith("VmHWM:"):
                        self.peaks[kind] = max(self.peaks[kind], int(line.split()[1]) << 10)


def _finished_log(folder: Path) -> Path:
    for _ in range(LOG_SECONDS):
        logs = list(folder.iterdir())
        if len(logs) == 1 and logs[0].suffix != ".inprogress":
            return logs[0]
        time.sleep(1)
    raise SystemExit(f"no finished event log in {folder} after {LOG_SECONDS} s, but {logs}")


def read_log(log: Path) -> tuple[int, int]:
    """Return (tasks of the Spark stage with most, shuffle bytes written) of an event log."""
    tasks: dict[int, int] = {}
    shuffle = 0
    with log.open() as stream:
        for line in stream:
            if line.startswith('{"Event":"SparkListenerTaskEnd"'):
                event = json.loads(line)
                tasks[event["Stage ID"]] = tasks.get(event["Stage ID"], 0) + 1
                shuffle += event["Task Metrics"]["Shuffle Write Metrics"]["Shuffle Bytes Written"]
    return max(tasks.values()), shuffle


@dataclass(frozen=True)
class Run:
    """All stages over `datasets` (data path -> rows) below `folder`."""

    folder: Path
    datasets: dict[str, int]
    cores: int

    def measure(self, steps: int | None) -> None:
        """Generate the rows, run the stages (at most `steps` that are new), and print a row of the table for each."""
        tokenizer = self.folder / "tokenizer"
        if not tokenizer.exists():
            real_tokenizer_folder(tokenizer)
        (self.folder / "ratios.yaml").write_text(yaml.safe_dump({name: RATIOS[name] for name in self.datasets}))
        row_bytes = {name: self._raw_bytes(name, rows) for name, rows in self.datasets.items()}
        print(f"{sum(row_bytes.values()) / 1e6:,.0f} MB of text as JSON: {row_bytes}\n\n| {COLUMNS} |")
        print("|---" + "|--:" * COLUMNS.count("|") + "|", flush=True)
        for stage, name, options in self._commands(tokenizer):
            measured, line = (self.folder / f"{stage}-{name}.{suffix}" for suffix in ("json", "txt"))
            if not measured.exists():
                if steps == 0:
                    return
                steps = steps and steps - 1
                measured.write_text(json.dumps(asdict(self._run(stage, name, options))))
            if not line.exists():
                used = Use(**json.loads(measured.read_text()))
                line.write_text(self._line(stage, name, used, self._formula(stage, name, row_bytes)))
                self._delete_input(stage, name)
            print(line.read_text(), flush=True)

    def _raw_bytes(self, name: str, rows: int) -> int:
        """Return the bytes of a data path's rows as JSON, which are made unless they are there."""
        counted = self.folder / f"raw-{name}.txt"
        if not counted.exists():
            counted.write_text(str(write_raw(self.folder / "raw" / name, name, rows, self.cores)))
        return int(counted.read_text())

    def _run(self, stage: str, name: str, options: list[str]) -> Use:
        logs = self.folder / "events" / f"{stage}-{name}-{time.time_ns()}"
        logs.mkdir(parents=True)
        environment = os.environ | {
            "SPARK_MASTER": f"local[{self.cores}]",
            "PYSPARK_SUBMIT_ARGS": f"{_event_log(logs)} pyspark-shell",
        }
        source, output = (self.folder / part / name for part in (_BEFORE[stage], stage))
        return run_stage([stage, str(source), str(output), *options, "--overwrite"], logs, environment)

    def _commands(self, tokenizer: Path) -> Iterator[tuple[str, str, list[str]]]:
        """Yield (stage, data path or "", options)."""
        for name in self.datasets:
            yield "preprocess", name, ["--dataset", DATASETS[name]]
            yield "filter", name, []
        yield "sample", "", ["--ratios", str(self.folder / "ratios.yaml")]
        yield "build", "", ["--tokenizer", str(tokenizer), "--length", str(LENGTH)]
        yield "pack", "", ["--length", str(LENGTH)]

    def _formula(self, stage: str, name: str, row_bytes: dict[str, int]) -> Use:
        """What docs/scale.md says of a stage that has run."""
        least = 4 * self.cores
        if stage == "preprocess":
            worker = 0.35e9 if name == "pictures" else 0.2e9
            return Use(max(least, _bytes(self.folder / "raw" / name) / (64 << 20)), worker=worker)
        if stage == "filter":
            images = self.datasets[name] if name == "pictures" else 0
            return Use(_shuffle_tasks(self.datasets[name]), 31.0 * self.datasets[name] + 172.0 * images)
        if stage == "sample":
            return Use(_shuffle_tasks(sum(self.datasets.values())), 0.875 * sum(row_bytes.values()))
        if stage == "build":
            size = _bytes(self.folder / "sample" / "data")
            return Use(max(min(least, size / (4 << 20)), size / (128 << 20)), worker=0.36e9, driver=0.25e9)
        manifest = self._manifest()
        sampled = self.datasets.get("pictures", 0) * RATIOS["pictures"]
        shards = len(manifest.shards)
        return Use(
            tasks=max(shards, self.cores),  # before the shuffle one a core
            shuffle=2.25 * manifest.tokens + 120 * sampled,
            worker=0.4e9 + 7 * manifest.tokens / shards,
            driver=0.22e9 + 72 * manifest.packs,
        )

    def _delete_input(self, stage: str, name: str) -> None:
        """Delete the rows that a step has read. preprocess's blobs stay: pack reads them."""
        for folder in [self.folder / "raw" / name] if stage == "preprocess" else self._rows_read(stage, name):
            shutil.rmtree(folder)

    def _rows_read(self, stage: str, name: str) -> Iterator[Path]:
        for output in self.datasets if stage == "sample" else [name]:
            yield self.folder / _BEFORE[stage] / output / "data"

    def _line(self, stage: str, name: str, used: Use, formula: Use) -> str:
        output = self._packed() if stage == "pack" else self.folder / stage / name
        rows = Report.load(Folder(str(output)), stage).counts.rows_in
        cells = [
            f"{stage} {name}".strip(),
            f"{rows:,}",
            f"{used.seconds:,.0f}",
            f"{used.cpu:,.0f}, {used.jvm_cpu:,.0f}",
        ]
        cells += [_beside(used.tasks, formula.tasks), _beside(used.shuffle / 1e6, formula.shuffle / 1e6)]
        cells += [_beside(used.driver / 1e6, formula.driver / 1e6), f"{used.jvm / 1e6:,.0f}"]
        return f"| {' | '.join([*cells, _beside(used.worker / 1e6, formula.worker / 1e6)])} |"

    def _packed(self) -> Path:
        (packed,) = (self.folder / "pack").glob("packed_*")
        return packed

    def _manifest(self) -> Manifest:
        return Manifest.load(Folder(str(self._packed())))


_BEFORE = {"preprocess": "raw", "filter": "preprocess", "sample": "filter", "build": "sample", "pack": "build"}


def _beside(measured: float, formula: float) -> str:
    """Write both, and mark what is over 20 % off the formula."""
    if not formula:
        return f"{measured:,.2f}" if measured % 1 else f"{measured:,.0f}"
    mark = " **above**" if measured > 1.2 * formula else " **below**" if measured < 0.8 * formula else ""
    return f"{measured:,.0f} / {formula:,.0f}{mark}"


def _shuffle_tasks(rows: int) -> float:
    return max(SHUFFLE_PARTITIONS, rows // SHUFFLE_ROWS)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".jsonl", ".parquet"))


def _event_log(folder: Path) -> str:
    settings = {"enabled": "true", "dir": folder.as_uri(), "compress": "false", "rolling.enabled": "false"}
    return " ".join(f"--conf spark.eventLog.{key}={value}" for key, value in settings.items())


def main() -> None:
    parser = Parser(description=__doc__, example="python -m benchmarks.scale --rows 100000 --images 10000 /local/scale")
    parser.add_argument("--rows", type=int, default=20_000, help="of text")
    parser.add_argument("--images", type=int, default=2_000, help="rows with a picture")
    parser.add_argument("--cores", type=int, default=2, help="of Spark's local mode")
    parser.add_argument("--steps", type=int, help="stop after this number of steps that had not been measured")
    parser.add_argument("folder", nargs="?", help="a temporary one if left out")
    args = parser.parse_args()
    rows = {"documents": args.rows // 2, "chats": args.rows - args.rows // 2, "pictures": args.images}
    datasets = {name: count for name, count in rows.items() if count}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).absolute() / "scale"
        folder.mkdir(parents=True, exist_ok=True)
        Run(folder, datasets, args.cores).measure(args.steps)


if __name__ == "__main__":
    main()
