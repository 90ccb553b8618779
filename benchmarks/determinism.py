"""`deterministic: true` on a GPU: whether runs have the same bits, also resumed ones, and what that costs.

usage: python benchmarks/determinism.py DATA [--equal 0.5B] [--cost 1.5B] [--precisions bf16 fp8] [--steps 6]
DATA is what text_data.py wrote. Of `--equal` it trains twice, and once more from the checkpoint in the middle, each in
a separate process, and compares the loss and gradient norm of every step and a digest of all weights; without the
switch too, where they may differ. Of `--cost` it compares tokens/s with and without.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import xxhash

from benchmarks.side_by_side import train
from benchmarks.train_text import config_of
from kanyun.cli.parser import Parser
from trainer.checkpoint.store import step_name
from trainer.config import TrainConfig
from trainer.planning import planner
from trainer.runtime import Runtime
from trainer.trainer import Run, Trainer

GLOBAL_BATCH = 4


def config(args: argparse.Namespace, folder: Path) -> TrainConfig:
    changes = {"steps": args.steps, "save_every": args.steps // 2, "warmup_steps": 2}
    changes |= {"output": args.output or str(folder / "out"), "resume": args.resume}
    return config_of(args, folder).model_copy(update={**changes, "deterministic": args.deterministic})


def whole_run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train to the last step. Each step's loss and gradient norm, and a digest of the weights behind it."""
    planner.FP8_HIDDEN = 0 if args.precision == "fp8" else 1 << 30
    run = Run.prepare(config(args, folder), 1, torch.cuda.is_available())
    with Runtime.start(deterministic=args.deterministic) as runtime, Trainer(run, runtime) as trainer:
        trainer.train()
        digest = xxhash.xxh3_128()
        for _, weight in trainer.model.named_weights():
            digest.update(weight.detach().contiguous().view(torch.uint8).cpu().numpy())
    lines = [json.loads(line) for line in (Path(run.output.path) / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: [line["loss"], line["grad_norm"]] for line in lines}
    return {"steps": steps, "weights": digest.hexdigest()}


def speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    args.steps, args.profile = 4, False
    return train(args, config_of(args, folder).model_copy(update={"deterministic": args.deterministic}))


def equal(args: argparse.Namespace, precision: str, deterministic: bool) -> str:
    """A row: in how many steps a second run and a resumed one differ from the first."""
    with tempfile.TemporaryDirectory() as outputs:
        same = ["--model", args.equal, "--precision", precision, *(["--deterministic"] if deterministic else [])]
        first, second = (child("run", *same, "--output", f"{outputs}/{name}") for name in "ab")
        middle = next(Path(outputs, "a").rglob(step_name(args.steps // 2)))
        resumed = child("run", *same, "--output", f"{outputs}/c", "--resume", str(middle))
    cells = []
    for other in (second, resumed):
        differ = [step for step, found in other["steps"].items() if found != first["steps"][step]]
        weights = "the same weights" if other["weights"] == first["weights"] else "other weights"
        cells.append(f"{len(differ)} of {len(other['steps'])} steps differ, {weights}")
    return f"| {args.equal}, {precision}, deterministic: {str(deterministic).lower()} | {' | '.join(cells)} |"


def child(only: str, *options: str) -> Any:
    done = subprocess.run([sys.executable, *sys.argv, "--only", only, *options], stdout=subprocess.PIPE, text=True)
    *_, last = done.stdout.splitlines() or [""]
    if done.returncode or not last.startswith("RESULT "):
        sys.exit(f"{only} {options} failed: {done.stdout[-2000:]}")
    return json.loads(last.removeprefix("RESULT "))


def main(args: argparse.Namespace) -> None:
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch", torch.__version__)
    print("| | a second run | resumed in the middle |\n|---|---|---|")
    for precision in args.precisions:
        for deterministic in (True, False):
            print(equal(args, precision, deterministic), flush=True)
    print("| tokens/s | without | deterministic | costs |\n|---|--:|--:|--:|")
    for precision in args.precisions:
        same = ["--model", args.cost, "--precision", precision]
        without, with_it = child("speed", *same)["tokens/s"], child("speed", *same, "--deterministic")["tokens/s"]
        cost = without / with_it - 1
        print(f"| {args.cost}, {precision} | {without:,.0f} | {with_it:,.0f} | {cost:.1%} |", flush=True)


if __name__ == "__main__":
    parser = Parser(description=__doc__, example="python benchmarks/determinism.py DATA --equal 0.5B --cost 1.5B")
    parser.add_argument("data")
    parser.add_argument("--equal", default="0.5B")
    parser.add_argument("--cost", default="1.5B")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--steps", type=int, default=6)
    for name in ("only", "precision", "model", "output", "resume"):  # of a child
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--deterministic", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.global_batch = 16 if args.only == "speed" else GLOBAL_BATCH
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            print("RESULT " + json.dumps((whole_run if args.only == "run" else speed)(args, Path(folder))))
    else:
        main(args)
