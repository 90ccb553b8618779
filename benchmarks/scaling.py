"""Training on several GPUs of one machine beside one GPU on the same work: whole steps, tokens/s and TFLOP/s a GPU.

usage: python benchmarks/scaling.py DATA OUT [--gpus 1 2 4 8] [--rows 7B:8 7B:8:bf16 ...] [--seconds 120]
       python benchmarks/scaling.py DATA OUT --gpus 1 2 --curves [--steps 100]
DATA holds `text` (text_data.py) and `vision` (vision_data.py). Results are in OUT after each row: rows.jsonl, and
table.md with the machine and versions; with --curves, losses.csv and losses.svg.

A row is MODEL:PACKS[:OPTION ...], packs a rank and step. Options: bf16; for VL models 2, 4 or 6 pictures a pack instead
of the mix; #2, #3 for the layout's second or third choice (python -m trainer.layout); sockets, which simulates two
nodes on a slow network: NCCL without NVLink and shared memory, over loopback sockets. The row all-reduce is the floor
of an exchange. A row that takes longer than --seconds is ended, and the next one starts.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from kanyun.cli.parser import Parser

FLOOR = "all-reduce"  # of FLOOR_BYTES by NCCL: what an exchange could reach
FLOOR_BYTES, FLOOR_REPEATS = 1 << 30, 20
TEXT = ["1.5B:2", "1.5B:8", "3B:2", "3B:8", "7B:8", "7B:16", "7B:8:bf16"]
ROWS = [FLOOR, *TEXT, "VL-3B:8", "VL-3B:8:6", "1.5B:8:sockets"]
BIG = ["VL-7B:4", "14B:4", "32B:4"]  # for four GPUs or more
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}
# Column of the table -> how its value is written.
COLUMNS = {
    "tokens/s": "{:,.0f}",
    "TFLOP/s": "{:.0f}",
    "of one GPU": "{:.1%}",
    "step s": "{:.3f}",
    "predicted s": "{:.3f}",
    "memory GB": "{:.1f}",
    "predicted GB": "{:.1f}",
    "slowest rank / mean": "{:.3f}",
    "start to first step s": "{:.0f}",
    "layout": "{}",
}
CURVE = "0.5B"  # the model of the loss curves, 8 packs a step on any number of GPUs


def main() -> None:
    parser = Parser(description=__doc__, example="python benchmarks/scaling.py DATA OUT --gpus 1 2 --rows 7B:8 1.5B:8")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="+", help=f"default: {' '.join(ROWS)}; from four GPUs on {' '.join(BIG)} too")
    parser.add_argument("--seconds", type=int, default=120, help="of a row, at most (120)")
    parser.add_argument("--steps", type=int, help="counted steps (4), or those of a curve (100)")
    parser.add_argument("--curves", action="store_true", help="loss curves instead of rows")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps = args.steps or (100 if args.curves else 4)
    if args.child:
        _child(args)
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.curves:
        _curves(args, out)
    else:
        _rows(args, out)


def _rows(args: argparse.Namespace, out: Path) -> None:
    lines = [
        f"{date.today()}, {_machine()}",
        "",
        f"| model:packs a rank | GPUs | {' | '.join(COLUMNS)} |",
        "|---|--:" + "|--:" * (len(COLUMNS) - 1) + "|---|",
    ]
    print("\n".join(lines), flush=True)
    for row in args.rows or ROWS + BIG * (max(args.gpus) >= 4):
        one = None
        for gpus in args.gpus if row != FLOOR else [count for count in args.gpus if count > 1]:
            result = _launch(row, gpus, args.seconds)
            if "tokens/s" in result:
                one = result["tokens/s"] if gpus == 1 else one
                result |= {"of one GPU": result["tokens/s"] / one} if one else {}
            with (out / "rows.jsonl").open("a") as file:
                file.write(json.dumps({"row": row, "gpus": gpus, **result}) + "\n")
            lines.append(line(row, gpus, result))
            print(lines[-1], flush=True)
            (out / "table.md").write_text("\n".join(lines) + "\n")


def line(row: str, gpus: int, result: dict[str, Any]) -> str:
    if said := result.get("error") or result.get("floor"):
        return f"| {row} | {gpus} | {said} |"
    cells = [form.format(result[name]) if result.get(name) is not None else "" for name, form in COLUMNS.items()]
    return f"| {row} | {gpus} | {' | '.join(cells)} |"


def _curves(args: argparse.Namespace, out: Path) -> None:
    """The same batches from the same weights under each kept layout; those that OUT has already are not run again.

    One GPU computes them with one, two and four packs a micro-batch: how far these differ is noise of reductions.
    """
    from benchmarks.loss_curves import write

    losses = _read_curves(out / "losses.csv")
    for gpus in args.gpus:
        for kind, layout in curves(gpus).items():
            name = f"{gpus} GPU{'s' * (gpus > 1)}, {kind}"
            if name in losses:
                continue
            result = _launch(f"{CURVE}:{8 // gpus}:{json.dumps(layout)}", gpus, args.seconds * 4)
            if "error" in result:
                print(f"{name}: {result['error']}", flush=True)
                continue
            losses[name] = result["losses"]
            write(losses, out)
    first, *others = losses or [""]
    for name in others:
        apart = [b - a for a, b in zip(losses[first], losses[name], strict=True)]
        distance = sum(map(abs, apart)) / len(apart)
        print(f"{name} - {first}: {sum(apart) / len(apart):+.4f} in the mean, {distance:.4f} without signs")


def curves(gpus: int) -> dict[str, dict[str, int]]:
    """Return the layouts of the curves on `gpus` GPUs: what they change of one pack a micro-batch and whole weights."""
    if gpus == 1:
        return {f"{packs} pack{'s' * (packs > 1)} a micro-batch": {"micro_batch": packs} for packs in (1, 2, 4)}
    return {"whole weights": {}, "sharded": {"weight_shards": gpus}, "tensor parallel": {"tensor_parallel": gpus}}


def _read_curves(path: Path) -> dict[str, list[float]]:
    if not path.exists():
        return {}
    with path.open() as file:
        (_, *names), *rows = csv.reader(file)
    return {name: [float(row[1 + column]) for row in rows] for column, name in enumerate(names)}


def _launch(row: str, gpus: int, seconds: int) -> dict[str, Any]:
    """Return the result of a row on `gpus` GPUs: figures, or an error."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    environment = os.environ | {"STARTED": str(time.time())} | (SOCKETS if "sockets" in row.split(":") else {})
    command = [sys.executable, *torchrun, *sys.argv, "--child", row]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            out, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            torchrun_and_ranks = psutil.Process(child.pid)  # each rank is a separate session
            for process in (*torchrun_and_ranks.children(recursive=True), torchrun_and_ranks):
                process.kill()
            return {"error": f"did not finish in {seconds} s"}
    lines = out.splitlines()
    print("\n".join(said for said in lines if not said.startswith("RESULT ")), end="\n" if len(lines) > 1 else "")
    results = [said.removeprefix("RESULT ") for said in lines if said.startswith("RESULT ")]
    return json.loads(results[0]) if results else {"error": f"failed with exit code {child.returncode}, see above"}


def _child(args: argparse.Namespace) -> None:
    """One rank of a row."""
    from kanyun.errors import UserError

    with tempfile.TemporaryDirectory() as folder:
        try:
            if args.child == FLOOR:
                result = _all_reduce()
            else:
                result = _curve(args, Path(folder)) if args.curves else _row(args, Path(folder))
        except UserError as error:
            result = {"error": str(error)}
    if os.environ["RANK"] == "0":
        print("RESULT " + json.dumps(result), flush=True)


def _all_reduce() -> dict[str, Any]:
    """Return NCCL's bus bandwidth: the bytes that a ring sends and receives on each GPU, over the time."""
    import torch
    import torch.distributed as dist

    from trainer.runtime import Runtime

    with Runtime.start() as runtime:
        values = torch.ones(FLOOR_BYTES // 2, dtype=torch.bfloat16, device=runtime.device)
        for repeat in range(2 + FLOOR_REPEATS):
            if repeat == 2:
                torch.cuda.synchronize()
                begun = time.perf_counter()
            dist.all_reduce(values)
        torch.cuda.synchronize()
        seconds, ranks = (time.perf_counter() - begun) / FLOOR_REPEATS, runtime.world_size
    rate = 2 * FLOOR_BYTES * (ranks - 1) / ranks / seconds
    return {"floor": f"{rate / 1e9:.1f} GB/s bus bandwidth, {1e3 * seconds:.2f} ms for {FLOOR_BYTES / 2**30:.0f} GiB"}


def _row(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.side_by_side import train

    model, packs, *options = args.child.split(":")
    args.precision = "bf16" if "bf16" in options else "fp8"
    choice = next((int(option[1:]) for option in options if option.startswith("#")), 1)
    config = _config(args, folder, model, int(packs), next((o for o in options if o in ("2", "4", "6")), "mix"))
    imported = time.time() - float(os.environ["STARTED"])
    result = train(args, config, choose(choice))
    return result | {"start to first step s": imported + result["first step s"]}


def _config(args: argparse.Namespace, folder: Path, model: str, packs: int, pictures: str = "mix") -> Any:
    from benchmarks import train_text, train_vision

    args.global_batch = packs * int(os.environ["WORLD_SIZE"])
    if model.startswith("VL"):
        args.size, args.row, args.data = f"Qwen2.5-{model}", pictures, f"{args.data}/vision"
        return train_vision.config_of(args, folder)
    args.model, args.data = model, f"{args.data}/text"
    return train_text.config_of(args, folder)


def choose(number: int) -> Callable[[Any], Any]:
    """Return what gives a run its layout's first, second ... choice."""

    def change(run: Any) -> Any:
        import torch

        from trainer.planning.gpus import find_gpu
        from trainer.planning.planner import LayoutPlanner

        if number == 1:
            return run
        planner = LayoutPlanner(run.model, find_gpu(torch.cuda.get_device_name()), int(os.environ["WORLD_SIZE"]))
        config, patches = run.config, run.data.vision_budget
        ranked = planner.ranked(length=config.length, global_batch=config.global_batch, patches=patches)
        return replace(run, layout=ranked[number - 1])

    return change


def _curve(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the losses of a curve's steps."""
    import torch

    from trainer.optim.optimizer import learning_rate
    from trainer.runtime import Runtime
    from trainer.trainer import Run, Trainer

    model, packs, changes = args.child.split(":", 2)
    config = _config(args, folder, model, int(packs)).model_copy(update={"steps": args.steps, "warmup_steps": 20})
    run = Run.prepare(config, int(os.environ["WORLD_SIZE"]), torch.cuda.is_available())
    layout = replace(run.layout, **{"weight_shards": 1, "tensor_parallel": 1, "micro_batch": 1} | json.loads(changes))
    start = Runtime.start(seed=config.seed, tensor_parallel=layout.tensor_parallel, weight_shards=layout.weight_shards)
    with start as runtime, Trainer(replace(run, layout=layout), runtime) as trainer:
        batches = islice(trainer.stream.batches(0), args.steps)
        losses = [trainer.train_step(b, learning_rate(config, n, args.steps)).loss for n, b in enumerate(batches)]
    return {"losses": losses}


def _machine() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"no GPU, torch {torch.__version__}"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
