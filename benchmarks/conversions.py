"""Conversion of a real size beside copies of the same bytes: wall and CPU time, and the largest memory.

    python benchmarks/conversions.py 3B /local/disk          # or 0.5B, 7B, VL-3B ...; --cold: files are not in memory

A Hugging Face folder of random weights is converted to a checkpoint, and that to a folder again, each by its command:
it reads, checks every value, compares or makes a digest of every file, writes, and flushes to the disk. Its peers move
the same bytes and flush them, too: `cp` with `sync`, and `dd` past the page cache, which is the floor of this disk.
Peers and command take turns (--turns), and their medians are compared. Warm: what is read is in the page cache, as far
as memory goes; cold: it was dropped from there.
Each waits until freed memory has gone back to the machine's host: in a virtual machine that reports free pages (the
file page_reporting below /sys/module says so) a copy of 3.1 GB takes 1.4 s of CPU time just after as many were deleted,
and 5.0 s 15 s later.
The start of a command, before it reads a weight, is timed by one on a tiny model and printed on its own.
The last two folders are compared by digests. The disk needs room for three models.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from kanyun.cli.parser import Parser
from kanyun.storage import Folder
from tests.support.qwen_assets import tiny_text_folder
from tests.support.random_models import write_model
from trainer.models.registry import published_sizes

GB = 1e9
WEIGHTS = (".safetensors", ".distcp")
FREED = 15  # s: see above
COPIES = {
    "cp, sync": "cp --reflink=never {files} '{out}' && sync '{out}'/* '{out}'",
    "dd, direct": 'for f in {files}; do dd if="$f" of=\'{out}\'/"${{f##*/}}" bs=4M oflag=direct conv=fsync; done',
}


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
    parser = Parser(description=__doc__, example="python benchmarks/conversions.py 3B /local/disk --cold")
    parser.add_argument("model", choices=sizes, metavar="MODEL", help=", ".join(sizes))
    parser.add_argument("folder", type=Path, help="on the disk to read and write")
    parser.add_argument("--cold", action="store_true", help="drop what is read from the page cache before")
    parser.add_argument("--turns", type=int, default=3, help="of copies and command (3)")
    args = parser.parse_args()
    here = args.folder / f"conversions-{os.getpid()}"
    here.mkdir(parents=True)
    try:
        start_of_commands(here)
        size = sizes[args.model]
        write_model(here / "hf", size, size.num_layers, size.vocab_size)
        measure(args.model, here, args.cold, args.turns)
    finally:
        shutil.rmtree(here, ignore_errors=True)


def start_of_commands(here: Path) -> None:
    """Print what each command takes on a tiny model, the second time: the first one reads torch from the disk."""
    tiny_text_folder(here / "tiny")
    for turn in (1, 2):
        megatron = here / f"tiny-megatron-{turn}"
        times = {
            "to-megatron": convert("to-megatron", here / "tiny", megatron),
            "to-hf": convert("to-hf", megatron, here / f"tiny-back-{turn}"),
        }
    for name, took in times.items():
        print(f"start of {name}: {took.wall:.1f} s, {took.cpu:.1f} s CPU, {took.memory / GB:.2f} GB", flush=True)


def measure(model: str, here: Path, cold: bool, turns: int) -> None:
    hf, megatron, back = here / "hf", here / "megatron", here / "back"
    shards = [path.stat().st_size for path in weights_of(hf)]
    size, largest = sum(shards), max(shards)
    cache = "dropped from" if cold else "in"
    print(f"{model}: {size / GB:.2f} GB, largest file {largest / GB:.2f} GB; what is read is {cache} the page cache")
    before = digests(hf)
    for name, source, out in (("to-megatron", hf, megatron), ("to-hf", megatron, back)):
        took: dict[str, list[Took]] = {}
        commands = {
            **{peer: partial(copy, peer, source, here / "copy") for peer in COPIES},
            name: partial(convert, name, source, out),
        }
        for _ in range(turns):
            for each, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                prepare(source, cold)
                took.setdefault(each, []).append(command())
                print(f"{each:12}{took[each][-1].line(size)}", flush=True)
        wall = {each: median(one.wall for one in times) for each, times in took.items()}
        ratios = ", ".join(f"{wall[name] / wall[peer]:.2f} x {peer}" for peer in COPIES)
        memory = max(one.memory for one in took[name])
        print(f"{name}, medians: {ratios}; memory {memory / largest:.2f} x the largest file", flush=True)
        shutil.rmtree(source)
    print(f"there and back: {'the same bytes' if digests(back) == before else 'NOT THE SAME'}")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: Folder(str(folder)).digest(path.name) for path in weights_of(folder)}


def convert(name: str, source: Path, out: Path) -> Took:
    return timed([sys.executable, "-m", "convert", name, str(source), str(out)])


def copy(peer: str, source: Path, out: Path) -> Took:
    """Copy the weights below a folder, and delete the copy."""
    out.mkdir()
    files = " ".join(f"'{path}'" for path in weights_of(source))
    took = timed(["bash", "-c", f"set -e; {COPIES[peer].format(files=files, out=out)} 2> /dev/null"])
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


def timed(command: list[str]) -> Took:
    """Run a command, which must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"{process.args!r} ended with {os.waitstatus_to_exitcode(status)}")
    return Took(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
