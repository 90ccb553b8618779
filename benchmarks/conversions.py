"""Conversion of a real size beside a copy of the same bytes: wall and CPU time, and the largest memory.

    python benchmarks/conversions.py 3B /local/disk          # or 0.5B, 7B, VL-3B ...; --cold: files are not in memory

A Hugging Face folder of random weights is converted to a checkpoint, and that to a folder again, each by its command.
The peer is `cp` of the command's weights followed by a flush of the copy, before and after it: our commands flush what
they write, too. Warm: what is read is in the page cache, as far as memory goes; cold: it was dropped from there.
Each waits until freed memory has gone back to the machine's host: in a virtual machine that reports free pages (the
file page_reporting below /sys/module says so) a copy of 3.1 GB takes 1.4 s of CPU time just after as many were deleted,
and 5.0 s 15 s later.
The start of a command, before it reads a weight, is timed by one on a tiny model and printed on its own.
The last two folders are compared by digests. The disk needs room for three models.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kanyun.storage import Folder
from tests.support.qwen_assets import tiny_text_folder
from tests.support.random_models import write_model
from trainer.models.registry import published_sizes

GB = 1e9
WEIGHTS = (".safetensors", ".distcp")
FREED = 15  # s: see above


@dataclass(frozen=True)
class Took:
    """What a command took of the machine."""

    wall: float  # s
    cpu: float  # s
    memory: int  # bytes, of its largest process

    def line(self, size: int) -> str:
        return f"{self.wall:7.1f} s {size / self.wall / GB:6.2f} GB/s {self.cpu:7.1f} s CPU {self.memory / GB:6.2f} GB"


def main() -> None:
    sizes = {name.removeprefix("Qwen2.5-"): size for name, size in published_sizes().items()}
    parser = argparse.ArgumentParser(description="Conversion beside a copy of the same bytes.")
    parser.add_argument("model", choices=sizes, metavar="MODEL", help=", ".join(sizes))
    parser.add_argument("folder", type=Path, help="on the disk to read and write")
    parser.add_argument("--cold", action="store_true", help="drop what is read from the page cache before")
    args = parser.parse_args()
    here = args.folder / f"conversions-{os.getpid()}"
    here.mkdir(parents=True)
    try:
        start = start_of_commands(here)
        size = sizes[args.model]
        write_model(here / "hf", size, size.num_layers, size.vocab_size)
        measure(args.model, here, args.cold, start)
    finally:
        shutil.rmtree(here, ignore_errors=True)


def start_of_commands(here: Path) -> dict[str, Took]:
    """Return what each command takes on a tiny model, the second time: the first one reads torch from the disk."""
    tiny_text_folder(here / "tiny")
    for turn in (1, 2):
        megatron = here / f"tiny-megatron-{turn}"
        times = {
            "to-megatron": convert("to-megatron", here / "tiny", megatron),
            "to-hf": convert("to-hf", megatron, here / f"tiny-back-{turn}"),
        }
    for name, took in times.items():
        print(f"start of {name}: {took.wall:.1f} s, {took.cpu:.1f} s CPU, {took.memory / GB:.2f} GB", flush=True)
    return times


def measure(model: str, here: Path, cold: bool, start: dict[str, Took]) -> None:
    hf, megatron, back = here / "hf", here / "megatron", here / "back"
    shards = [path.stat().st_size for path in weights_of(hf)]
    size, largest = sum(shards), max(shards)
    cache = "dropped from" if cold else "in"
    print(f"{model}: {size / GB:.2f} GB, largest file {largest / GB:.2f} GB; what is read is {cache} the page cache")
    before = digests(hf)
    for name, source, out in (("to-megatron", hf, megatron), ("to-hf", megatron, back)):
        copies = [copy(source, here / "copy", cold)]
        prepare(source, cold)
        ours = convert(name, source, out)
        copies.append(copy(source, here / "copy", cold))
        for took in copies:
            print(f"{'cp, flushed':12}{took.line(size)}", flush=True)
        best, work = min(took.wall for took in copies), ours.wall - start[name].wall
        print(
            f"{name:12}{ours.line(size)}: {ours.wall / best:.2f} x the faster copy, {work / best:.2f} x without the "
            f"start; memory {ours.memory / largest:.2f} x the largest file",
            flush=True,
        )
        shutil.rmtree(source)
    print(f"there and back: {'the same bytes' if digests(back) == before else 'NOT THE SAME'}")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: Folder(str(folder)).digest(path.name) for path in weights_of(folder)}


def convert(name: str, source: Path, out: Path) -> Took:
    return timed([sys.executable, "-m", "convert", name, str(source), str(out)])


def copy(source: Path, out: Path, cold: bool) -> Took:
    """Copy the weights below a folder with cp, and delete the copy."""
    prepare(source, cold)
    out.mkdir()
    files = " ".join(f"'{path}'" for path in weights_of(source))
    took = timed(["bash", "-c", f"cp --reflink=never {files} '{out}' && sync '{out}'/* '{out}'"])
    shutil.rmtree(out)
    return took


def prepare(source: Path, cold: bool) -> None:
    """Flush everything that waits to be written; then drop the weights from memory, or read them into it."""
    os.sync()
    time.sleep(FREED)
    for path in weights_of(source):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                buffer = bytearray(1 << 20)
                while file.readinto(buffer):
                    pass


def weights_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in WEIGHTS)


def timed(command: Iterable[str]) -> Took:
    """Run a command, which must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"{process.args!r} ended with {os.waitstatus_to_exitcode(status)}")
    return Took(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
