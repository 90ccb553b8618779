"""Saves of a real size: the stall in the loop, the whole time, steps beside it, and the floor of each.

    python benchmarks/saves.py VL-3B /local/disk                # or 1.5B, 3B, 7B; tiny: a dry run on any machine
    torchrun --nproc-per-node 8 benchmarks/saves.py 7B /local/disk

Model and optimizer have random weights; a "step" is matrix products in bfloat16, about as long as a real one, so that
what writing takes from training shows as steps beside a save against steps without one. The floor of the stall is a
copy of the same bytes from the device to page-locked memory; those of the whole time are a plain copy of the
checkpoint's files on the same disk, and the same bytes written out of memory by as many threads as a rank has.
Each line is printed as soon as it is known, and nothing is begun that would not end within --minutes. The disk needs
room for 1.4 checkpoints, not for two: each is deleted before the next.
"""

import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from kanyun.cli.parser import Parser
from kanyun.storage import Folder
from trainer.checkpoint import State
from trainer.checkpoint.model_parts import parts_of
from trainer.checkpoint.parts import buffer_size
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.writer import FILES
from trainer.config import TrainConfig
from trainer.metrics import process_age
from trainer.models.config import ModelConfig
from trainer.models.initialize import build_model
from trainer.models.qwen2_5.config import WindowedVisionConfig
from trainer.models.registry import published_sizes
from trainer.optim.data_parallel import OverlappedDataParallel
from trainer.optim.optimizer import build_optimizer
from trainer.runtime import Runtime

GB = 1e9
SAVES_IN = 100  # steps
ROOM = 1.4  # of a checkpoint, on the disk: the largest of its four files is there twice for a moment
_PIECE = 16 << 20  # bytes, of a plain copy


def sizes() -> dict[str, ModelConfig]:
    """Return the models by the names that the command line takes."""
    published = published_sizes()
    large = published["Qwen2.5-VL-3B"]
    assert large.vision is not None
    vision = replace(large.vision, depth=2, hidden_size=160, intermediate_size=320, num_heads=2, out_hidden_size=256)
    tiny = replace(large, vocab_size=2048, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=2)
    assert isinstance(vision, WindowedVisionConfig)
    tiny = replace(tiny, num_kv_heads=1, vision=replace(vision, full_attention_blocks=(1,)))
    return {name.removeprefix("Qwen2.5-"): config for name, config in published.items()} | {"tiny": tiny}


def main() -> None:
    models = sizes()
    parser = Parser(description=__doc__, example="python benchmarks/saves.py VL-3B /local/disk")
    parser.add_argument("model", choices=models, metavar="MODEL", help=", ".join(models))
    parser.add_argument("folder", type=Path, help="on the disk to write to")
    parser.add_argument("--saves", type=int, default=2)
    parser.add_argument("--step-seconds", type=float, default=1.0, help="of the steps beside which it is written")
    parser.add_argument("--minutes", type=float, default=4.0, help="of the whole benchmark")
    args = parser.parse_args()
    here = args.folder / f"saves-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    with Runtime.start() as runtime:
        try:
            measure(args, models[args.model], here, runtime)
        finally:
            if runtime.rank == 0:
                shutil.rmtree(here, ignore_errors=True)


def measure(args: argparse.Namespace, config: ModelConfig, here: Path, runtime: Runtime) -> None:
    model = build_model(config, runtime)
    ddp = OverlappedDataParallel(model.config, model)
    values = {"model": "", "data": "", "output": "", "length": 1, "global_batch": 1, "steps": 1, "lr": 1e-3}
    optimizer = build_optimizer(TrainConfig.model_validate(values), ddp, runtime)
    run, hf = here / "run", here / "hf"
    if runtime.rank == 0:
        run.mkdir(parents=True)
        hf.mkdir()
        (hf / "config.json").write_text("{}")
        (hf / "tokenizer.json").write_text("{}")
    dist.barrier()
    parts = parts_of(model, optimizer, check=False)
    copied = buffer_size(parts)
    on_disk = sum(gathered(sum(part.size for part in parts)))
    say(runtime, f"{args.model}: {on_disk / GB:.2f} GB in a checkpoint, {machine(runtime, args.folder)}")
    if (free := shutil.disk_usage(args.folder).free) < on_disk * ROOM:
        raise SystemExit(f"{args.folder} has {free / GB:.1f} GB free, {on_disk * ROOM / GB:.1f} are needed")
    rate = device_to_host(runtime)
    say(runtime, f"floor of the stall: {copied / GB:.2f} GB a rank at {rate / GB:.1f} GB/s take {copied / rate:.2f} s")

    saver = Saver(Folder(str(run)), Folder(str(hf)), local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    started = time.perf_counter()
    for sentence in saver.prepare(model, optimizer, runtime.device):
        say(runtime, sentence)
    say(runtime, f"host buffer ready after {time.perf_counter() - started:.1f} s (once a run)")

    work = torch.randn(8192 if runtime.cuda else 1024, 8192, device=runtime.device, dtype=runtime.dtype)
    rounds = calibrate(work, args.step_seconds)
    alone = [step(work, rounds) for _ in range(5)]
    whole = 0.0
    for number in range(1, args.saves + 1):
        if not in_time(args.minutes, whole):
            say(runtime, f"save {number}: left out, it would not end within {args.minutes:g} minutes")
            break
        state = State(number, number, 0, "", asdict(config), {})
        started = time.perf_counter()
        saver.start(state, model, optimizer)
        stall = time.perf_counter() - started
        beside = []
        while saver.in_flight:
            beside.append(step(work, rounds))
        saver.finish()
        whole = time.perf_counter() - started
        if error := saver.news():
            raise SystemExit(error)
        slower = f"{median(beside) / median(alone) - 1:+.1%}" if beside else "none"
        say(
            runtime,
            f"save {number}: stall {stall:.2f} s ({stall / SAVES_IN / median(alone):.2%} of {SAVES_IN} steps of "
            f"{median(alone):.2f} s), whole {whole:.1f} s ({on_disk / whole / GB:.2f} GB/s), {len(beside)} steps "
            f"beside it: {slower}",
        )
        if runtime.rank == 0:
            if number == 1:
                floors(run, args.minutes, whole)
            shutil.rmtree(run / "checkpoints")  # the disk may have no room for two
        dist.barrier()
    saver.close()


def in_time(minutes: float, seconds: float) -> bool:
    """Return whether what takes `seconds` ends in time, as rank 0 sees it. Every rank calls it."""
    answers = gathered(int(process_age() + seconds < 60 * minutes))
    return bool(answers[0])


def floors(run: Path, minutes: float, whole: float) -> None:
    """Time what nothing that writes a checkpoint can be faster than; the checkpoint's files are used up."""
    folder = next((run / "checkpoints").glob("step_*"))
    files = [file for file in folder.rglob("*") if file.is_file()]
    sizes_of = [file.stat().st_size for file in files]
    target = run / "floor"
    target.mkdir()
    for what, write in (
        ("a plain copy, file after file", lambda: move_files(files, target)),
        (f"{FILES} threads that write out of memory", lambda: write_files(target, sizes_of)),
    ):
        if process_age() + whole > 60 * minutes:
            print(f"floor of the whole: {what}: left out, it would not end within {minutes:g} minutes", flush=True)
            continue
        started = time.perf_counter()
        write()
        seconds = time.perf_counter() - started
        rate = sum(sizes_of) / seconds / GB
        print(f"floor of the whole: {what}: {seconds:.1f} s ({rate:.2f} GB/s), flushed", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        for file in target.iterdir():
            file.unlink()
    target.rmdir()


def write_files(target: Path, sizes_of: list[int]) -> None:
    """Write files of these sizes at once, each flushed."""
    piece = memoryview(os.urandom(_PIECE))

    def write(number: int) -> None:
        with (target / str(number)).open("wb", buffering=0) as file:
            for begin in range(0, sizes_of[number], _PIECE):
                file.write(piece[: sizes_of[number] - begin])
            os.fsync(file.fileno())

    with ThreadPoolExecutor(FILES) as pool:
        list(pool.map(write, range(len(sizes_of))))


def move_files(files: list[Path], target: Path) -> None:
    """Copy one file after the other, each flushed, and delete the original behind its copy."""
    for number, source in enumerate(files):
        with source.open("rb", buffering=0) as old, (target / str(number)).open("wb", buffering=0) as new:
            shutil.copyfileobj(old, new, _PIECE)
            os.fsync(new.fileno())
        source.unlink()


def device_to_host(runtime: Runtime) -> float:
    """Return bytes a second of a copy from the device to page-locked memory, the best of three of 2 GB."""
    count = 2 * 10**9 if runtime.cuda else 10**7
    source = torch.zeros(count, dtype=torch.uint8, device=runtime.device)
    target = torch.empty(count, dtype=torch.uint8, pin_memory=runtime.cuda)
    times = []
    for _ in range(4):  # the first one warms up
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(source)
        times.append(time.perf_counter() - started)
    return count / min(times[1:])


def machine(runtime: Runtime, folder: Path) -> str:
    device = torch.cuda.get_device_name() if runtime.cuda else "CPU"
    free = shutil.disk_usage(folder).free / GB
    return f"{runtime.world_size} rank(s), {device}, {free:.0f} GB free on the disk, torch {torch.__version__}"


def gathered(value: int) -> list[int]:
    values = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def calibrate(work: torch.Tensor, seconds: float) -> int:
    step(work, 2)
    return max(1, round(seconds / (step(work, 8) / 8)))


def step(work: torch.Tensor, rounds: int) -> float:
    """Return the seconds of `rounds` matrix products, as the host sees them."""
    started = time.perf_counter()
    for _ in range(rounds):
        work @ work.T
    synchronize(work)
    return time.perf_counter() - started


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def say(runtime: Runtime, text: str) -> None:
    if runtime.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
