"""Saves of a real size: the stall in the loop, the whole time, and a plain copy of the same bytes to the same disk.

    python benchmarks/saves.py 1.5B /local/disk                 # or VL-3B, 3B, 7B
    torchrun --nproc-per-node 8 benchmarks/saves.py 7B /local/disk

Model and optimizer have random weights; a "step" is the model's matrix products in bfloat16, about as long as a real
one, so that what writing takes from training shows as steps beside a save against steps without one.
"""

import argparse
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from kanyun.storage import Folder
from trainer import checkpoint
from trainer.checkpoint import Saver, State
from trainer.checkpoint.verify import faults
from trainer.config import TrainConfig
from trainer.models.initialize import build_model
from trainer.models.registry import published_sizes
from trainer.optim.optimizer import build_optimizer
from trainer.runtime import Runtime

GB = 1e9
SIZES = published_sizes()


def main() -> None:
    parser = argparse.ArgumentParser(description="Stall and whole time of a save.")
    parser.add_argument("model", help=", ".join(SIZES))
    parser.add_argument("folder", type=Path, help="on the disk to write to")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--step-seconds", type=float, default=2.0, help="of the steps beside which it is written")
    args = parser.parse_args()
    name = next(size for size in SIZES if size.endswith(args.model))
    here = args.folder / f"saves-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    with Runtime.start() as runtime:
        try:
            measure(args, name, here, runtime)
        finally:
            dist.barrier()
            if runtime.rank == 0:
                shutil.rmtree(here, ignore_errors=True)


def measure(args: argparse.Namespace, name: str, here: Path, runtime: Runtime) -> None:
    model = build_model(SIZES[name], runtime)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    values = {"model": "", "data": "", "output": "", "length": 1, "global_batch": 1, "steps": 1, "lr": 1e-3}
    optimizer = build_optimizer(TrainConfig.model_validate(values), ddp, runtime)
    hf = here / "hf"
    if runtime.rank == 0:
        hf.mkdir(parents=True)
        (here / "run").mkdir()
        (hf / "config.json").write_text("{}")
        (hf / "tokenizer.json").write_text("{}")
    dist.barrier()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    saver = Saver(Folder(str(here / "run")), Folder(str(hf)), local_ranks=local)
    started = time.perf_counter()
    for sentence in saver.prepare(model, optimizer, runtime.device):
        print(sentence)
    say(runtime, f"{name}: host buffer ready after {time.perf_counter() - started:.1f} s (once a run)")

    work = torch.randn(8192, 8192, device=runtime.device, dtype=runtime.dtype)
    rounds = calibrate(work, args.step_seconds)
    alone = [step(work, rounds) for _ in range(5)]
    for number in range(1, args.saves + 1):
        state = State(number, number, 0, "", asdict(SIZES[name]), {})
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
        slower = median(beside) / median(alone) - 1 if beside else float("nan")
        say(runtime, f"save {number}: stall {stall:.2f} s, whole {whole:.1f} s, steps beside it {slower:+.1%}")
    saver.close()
    if runtime.rank == 0:
        folder = Folder(str(here / "run"))
        newest = checkpoint.latest(folder)
        assert newest is not None
        size = sum(size for _, size in newest.files())
        print(f"{size / GB:.1f} GB on the disk; plain copy with fsync {plain_copy(Path(newest.path), here):.1f} s")
        started = time.perf_counter()
        assert not faults(newest)
        print(f"verify: {time.perf_counter() - started:.1f} s")
    dist.barrier()


def plain_copy(step: Path, here: Path) -> float:
    """Return the seconds that a copy of the checkpoint's files to the same disk takes, flushed: the floor of a save."""
    target = here / "copy"
    started = time.perf_counter()
    shutil.copytree(step, target)
    for file in target.rglob("*"):
        if file.is_file():
            checkpoint.sync_file(str(file))
    return time.perf_counter() - started


def calibrate(work: torch.Tensor, seconds: float) -> int:
    step(work, 2)
    return max(1, round(seconds / (step(work, 8) / 8)))


def step(work: torch.Tensor, rounds: int) -> float:
    """Return the seconds of `rounds` matrix products, as the host sees them."""
    started = time.perf_counter()
    for _ in range(rounds):
        work @ work
    if work.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def say(runtime: Runtime, text: str) -> None:
    if runtime.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
