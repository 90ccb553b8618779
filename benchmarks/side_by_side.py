"""Ours and its peers, each run in a separate process, as a table: what train_text.py and train_vision.py share."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.profiles import print_profile
from trainer.config import TrainConfig
from trainer.planning import planner

Run = Callable[[argparse.Namespace, Path], dict[str, Any]]  # works in its own folder
# Column of the table -> how its value is written.
WARM_UP = 2  # steps
COLUMNS = {
    "tokens/s": "{:,.0f}",
    "TFLOP/s": "{:.0f}",
    "MFU": "{:.1%}",
    "memory GB": "{:.1f}",
    "predicted GB": "{:.1f}",
    "micro-batch": "{}",
    "recomputed": "{}",
    "first step s": "{:.0f}",
    "data wait": "{:.2%}",
    "useful patches": "{:.1%}",
    "useful tokens": "{:.1%}",
}


@dataclass(frozen=True)
class Peer:
    """Somebody else's trainer, on the same input."""

    name: str  # in the table
    run: Run
    precisions: tuple[str, ...] = ("bf16",)
    usual: bool = True  # runs where `--peers` names none


def main(parser: argparse.ArgumentParser, what: str, default: list[str], ours: Run, peers: Mapping[str, Peer]) -> None:
    """Rows of the table for each of `--whats`: peers, then ours, in each precision they have.

    A child of this script is told one row as `--only NAME --what WHAT --precision PRECISION`. The last column has ours
    over each peer above, in their order.
    """
    parser.add_argument("data")
    parser.add_argument(f"--{what}s", nargs="+", default=default)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--peer-steps", type=int, default=2)
    parser.add_argument("--global-batch", type=int, default=16)
    usual = [name for name, peer in peers.items() if peer.usual]
    parser.add_argument("--peers", nargs="*", default=usual, choices=list(peers))
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--profile", action="store_true")
    for name in ("only", "precision", what):  # of a child
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)  # of a peer that ran out of memory
    args = parser.parse_args()
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            result = (ours if args.only == "ours" else peers[args.only].run)(args, Path(folder))
        print("RESULT " + json.dumps(result))
        return
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch", torch.__version__)
    lines = [f"| {what} | | {' | '.join(COLUMNS)} | ours / peers |", "|---|---" + "|--:" * (len(COLUMNS) + 1) + "|"]
    for row in getattr(args, f"{what}s"):
        theirs: list[float] = []  # tokens/s
        for name in [] if args.ours_only else args.peers:
            peer = peers[name]
            for precision in [p for p in peer.precisions if p in args.precisions] or peer.precisions[:1]:
                result = _child("--only", name, f"--{what}", row, "--precision", precision)
                if result:
                    theirs.append(result["tokens/s"])
                    lines.append(_line(row, f"{peer.name}, {precision}", result, []))
        for precision in args.precisions:
            mine = _child("--only", "ours", f"--{what}", row, "--precision", precision)
            if mine:
                lines.append(_line(row, f"ours, {precision}", mine, theirs))
    print("\n".join(["", *lines]))


def train(
    args: argparse.Namespace, config: TrainConfig, change: Callable[[Any], Any] = lambda run: run
) -> dict[str, Any]:
    """Ours: whole steps, as Trainer does them, and what they took, a GPU.

    Not counted: the first two, and those in which a shape bucket's graph is captured, as each is once a run.

    `change`: returns another run in place of the prepared one.
    """
    from trainer.optim.optimizer import learning_rate
    from trainer.runtime import Runtime
    from trainer.trainer import Run, Trainer

    started = time.perf_counter()
    planner.FP8_HIDDEN = 0 if args.precision == "fp8" else 1 << 30
    world = int(os.environ.get("WORLD_SIZE", "1"))
    run = change(Run.prepare(config, world, torch.cuda.is_available()))
    split, shards, one_order = run.layout.tensor_parallel, run.layout.weight_shards, config.deterministic
    with (
        Runtime.start(tensor_parallel=split, weight_shards=shards, deterministic=one_order) as runtime,
        Trainer(run, runtime) as trainer,
    ):
        seconds, flops, losses, waits, work, first, real, slots = [], [], [], [], [], 0.0, 0, 0
        begun, waited, graphs = time.perf_counter(), 0.0, 0
        for step, batches in enumerate(trainer.stream.batches(0)):
            result = trainer.train_step(batches, learning_rate(config, step, config.steps or 0))
            now, wait = time.perf_counter(), trainer.stream.wait_seconds
            first = first or now - started
            losses.append(result.loss)
            captured = torch.tensor(trainer.graph.captured if trainer.graph else 0, device=runtime.device)
            dist.all_reduce(captured)
            if step >= WARM_UP and captured == graphs:
                seconds.append(now - begun)
                waits.append(wait - waited)
                work.append(max(result.ranks.work) / fmean(result.ranks.work))
                flops.append(result.flops)
                real += sum(batch.real_patches for batch in batches)
                slots += sum(len(batch.vision.patches) for batch in batches if batch.vision)
            if len(seconds) == args.steps:
                break
            begun, waited, graphs = time.perf_counter(), wait, int(captured)
        if args.profile:
            print_profile(run, lambda: trainer.train_step(batches, 1e-4), batches)
        counted, compute, micro_batch = sum(seconds), run.layout.compute, run.layout.micro_batch
        manifests = [dataset.manifest for dataset in run.data.datasets]
        packs, rate = sum(m.packs for m in manifests), sum(flops) / counted / world
        found = {
            "tokens/s": config.global_batch * trainer.tokens_per_pack * args.steps / counted / world,
            "TFLOP/s": rate / 1e12,
            "MFU": rate / trainer.peak if trainer.peak else 0,
            "memory GB": torch.cuda.max_memory_reserved() / 1e9,
            "predicted GB": (run.layout.memory or 0) / 1e9,
            "micro-batch": micro_batch,
            "recomputed": f"{compute.recomputed_blocks} blocks, {compute.recomputed_layers} layers",
            "data wait": sum(waits) / counted,
            "useful tokens": sum(m.tokens for m in manifests) / packs / config.length,
            "first step s": first,
            "step s": counted / args.steps,
            "predicted s": run.layout.step.seconds if run.layout.step else None,
            "slowest rank / mean": fmean(work),
            "layout": run.layout.reason,
            "losses": [round(losses[0], 3), round(losses[-1], 3)],
        }
        if slots:
            found["useful patches"] = real / slots
        return found


def _line(row: str, who: str, result: dict[str, Any], theirs: list[float]) -> str:
    cells = [form.format(result[name]) if name in result else "" for name, form in COLUMNS.items()]
    cells.append(", ".join(f"{result['tokens/s'] / tokens:.2f}" for tokens in theirs))
    return f"| {row} | {who} | {' | '.join(cells)} |"


def _child(*options: str) -> dict[str, Any]:
    """The result of this very script with these options; empty if it failed."""
    done = subprocess.run([sys.executable, *sys.argv, *options], stdout=subprocess.PIPE, text=True)
    *said, last = done.stdout.splitlines() or [""]
    if not last.startswith("RESULT "):
        print(f"{options} failed: {done.stdout[-2000:]}", flush=True)
        return {}
    print("\n".join([*said, f"{options[1::2]}: {last.removeprefix('RESULT ')}"]), flush=True)
    result: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return result
