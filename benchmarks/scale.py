"""The five stages over generated rows: time, tasks, shuffle bytes and memory, beside the formulas of docs/scale.md.

Half of --rows are documents (ratio 0.7), half chats (ratio 1.4); --images are rows with a small picture (ratio 0.5).
Each stage is its own command (python -m pipeline), so that its memory is its own: the highest resident size (VmHWM)
of the driver's Python, of the JVM and of the largest Python worker. Tasks and shuffle bytes come from Spark's event
log; tasks are those of the Spark stage with most. A figure more than 20 % above its formula is marked.

usage: python -m benchmarks.scale --rows N --images N [--cores N] [FOLDER]     (needs 12 kB of disk a row)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from benchmarks.scale_data import write_raw
from kanyun.manifest import Manifest
from kanyun.storage import Folder
from pipeline.reports.report import Report
from tests.support.qwen_assets import real_tokenizer_folder

LENGTH = 8192
DATASETS = {"documents": "text", "chats": "messages", "pictures": "messages"}  # data path -> dataset class
RATIOS = {"documents": 0.7, "chats": 1.4, "pictures": 0.5}
COLUMNS = "stage | rows | s | tasks / formula | shuffle, MB / formula | driver, MB | JVM, MB | worker, MB / formula"


@dataclass(frozen=True)
class Use:
    """Resources of a stage, measured or by formula."""

    tasks: float
    shuffle: float  # bytes written
    worker: float  # bytes resident of the largest Python worker, at most
    driver: float = 0.0  # of the driver's Python
    jvm: float = 0.0
    seconds: float = 0.0  # of the whole command


def run_stage(arguments: Sequence[str], logs: Path, environment: dict[str, str]) -> Use:
    """Run `python -m pipeline ARGUMENTS` and measure it. Raises SystemExit if it fails."""
    known, started = set(logs.iterdir()), time.time()
    peaks = {"driver": 0, "jvm": 0, "worker": 0}
    with subprocess.Popen([sys.executable, "-m", "pipeline", *arguments], env=environment) as process:
        while process.poll() is None:
            for kind, size in resident(process.pid):
                peaks[kind] = max(peaks[kind], size)
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"pipeline {' '.join(arguments)} ended with {process.returncode}: see above")
    seconds = time.time() - started
    (log,) = set(logs.iterdir()) - known
    return Use(*read_log(log), **peaks, seconds=seconds)


def resident(driver: int) -> Iterator[tuple[str, int]]:
    """Yield (driver | jvm | worker, highest resident bytes so far) of each process of a command."""
    try:
        processes = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    except psutil.Error:
        return
    for process in processes:
        try:
            kind = "driver" if process.pid == driver else "jvm" if process.name() == "java" else "worker"
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (psutil.Error, OSError):
            continue  # it has ended
        yield from ((kind, int(line.split()[1]) << 10) for line in status.splitlines() if line.startswith("VmHWM:"))


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

    def measure(self) -> None:
        """Generate the rows, run the stages, and print a row of the table for each."""
        folder, logs = self.folder, self.folder / "events"
        logs.mkdir(parents=True)
        tokenizer = real_tokenizer_folder(folder / "tokenizer")
        (folder / "ratios.yaml").write_text(yaml.safe_dump({name: RATIOS[name] for name in self.datasets}))
        row_bytes = {n: write_raw(folder / "raw" / n, n, rows, self.cores) for n, rows in self.datasets.items()}
        print(f"{sum(row_bytes.values()) / 1e6:,.0f} MB of text as JSON: {row_bytes}\n\n| {COLUMNS} |")
        print("|---" + "|--:" * COLUMNS.count("|") + "|", flush=True)
        environment = os.environ | {
            "SPARK_MASTER": f"local[{self.cores}]",
            "PYSPARK_SUBMIT_ARGS": f"{_event_log(logs)} pyspark-shell",
        }
        for stage, name, options in self._commands(tokenizer):
            source, output = (folder / part / name for part in (_BEFORE[stage], stage))
            used = run_stage([stage, str(source), str(output), *options], logs, environment)
            self._show(stage, name, used, self._formula(stage, name, row_bytes))

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
            return Use(max(least, _bytes(self.folder / "raw" / name) / (64 << 20)), 0, 0.35e9)
        if stage == "filter":
            images = self.datasets[name] if name == "pictures" else 0
            return Use(0, 31.0 * self.datasets[name] + 172.0 * images, 0)
        if stage == "sample":
            return Use(0, 0.875 * sum(row_bytes.values()), 0)
        if stage == "build":
            size = _bytes(self.folder / "sample" / "data")
            return Use(max(min(least, size / (4 << 20)), size / (128 << 20)), 0, 0.36e9)
        manifest = self._manifest()
        sampled = self.datasets.get("pictures", 0) * RATIOS["pictures"]
        shards = len(manifest.shards)
        return Use(shards, 2.25 * manifest.tokens + 120 * sampled, 0.4e9 + 7 * manifest.tokens / shards)

    def _show(self, stage: str, name: str, used: Use, formula: Use) -> None:
        output = self._packed() if stage == "pack" else self.folder / stage / name
        rows = Report.load(Folder(str(output)), stage).counts.rows_in
        cells = [f"{stage} {name}".strip(), f"{rows:,}", f"{used.seconds:,.0f}"]
        cells += [_beside(used.tasks, formula.tasks), _beside(used.shuffle / 1e6, formula.shuffle / 1e6)]
        cells += [f"{used.driver / 1e6:,.0f}", f"{used.jvm / 1e6:,.0f}"]
        print(f"| {' | '.join([*cells, _beside(used.worker / 1e6, formula.worker / 1e6)])} |", flush=True)

    def _packed(self) -> Path:
        (packed,) = (self.folder / "pack").glob("packed_*")
        return packed

    def _manifest(self) -> Manifest:
        return Manifest.load(Folder(str(self._packed())))


_BEFORE = {"preprocess": "raw", "filter": "preprocess", "sample": "filter", "build": "sample", "pack": "build"}


def _beside(measured: float, formula: float) -> str:
    """Write both, and mark what is over 20 % above the formula."""
    if not formula:
        return f"{measured:,.2f}" if measured % 1 else f"{measured:,.0f}"
    return f"{measured:,.0f} / {formula:,.0f}{' **above**' if measured > 1.2 * formula else ''}"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".jsonl", ".parquet"))


def _event_log(folder: Path) -> str:
    settings = {"enabled": "true", "dir": folder.as_uri(), "compress": "false", "rolling.enabled": "false"}
    return " ".join(f"--conf spark.eventLog.{key}={value}" for key, value in settings.items())


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="of text")
    parser.add_argument("--images", type=int, default=2_000, help="rows with a picture")
    parser.add_argument("--cores", type=int, default=2, help="of Spark's local mode")
    parser.add_argument("folder", nargs="?", help="a new folder; a temporary one if left out")
    args = parser.parse_args()
    rows = {"documents": args.rows // 2, "chats": args.rows - args.rows // 2, "pictures": args.images}
    datasets = {name: count for name, count in rows.items() if count}
    with tempfile.TemporaryDirectory() as temporary:
        Run(Path(args.folder or temporary).absolute() / "scale", datasets, args.cores).measure()


if __name__ == "__main__":
    main()
