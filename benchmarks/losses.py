"""bfloat16 against fp8 over 1,000 steps on data that is not repeated, as bands of three seeds.

usage: python benchmarks/losses.py DATA OUT [--steps 1000] [--seeds 0 1 2] [--seconds 540]
DATA is what text_data.py or vision_data.py wrote, of which only the model folder is read: Qwen2.5-0.5B for the one, the
small Qwen2.5-VL of vision_curves.py for the other. Packs are made here (unrepeated_data.py), one a step. A seed decides
the random weights and the order of the packs; both precisions have the same. Each curve is a separate process, which
imports while the one before trains; no new one is started that would end after `--seconds`. Writes OUT/losses.csv,
OUT/losses.svg and prints means; the last figure is the loss of 16 held-out packs. Curves that are in OUT/losses.csv
already are not run again.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.train_text import LENGTH, SIZES, model_folder, text_config
from benchmarks.unrepeated_data import make
from benchmarks.vision_curves import small
from benchmarks.vision_models import hf_config
from kanyun.cli.parser import Parser
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig

PRECISIONS = ("bf16", "fp8")
COLOURS = {"bf16": "#1f6feb", "fp8": "#d1242f"}
HELD_OUT = 16  # packs
SMOOTH = 25  # steps that a point of the curves is the mean of
Curves = dict[tuple[str, int], list[float]]  # precision, seed -> a loss a step, and behind them the held-out loss


@dataclass(frozen=True)
class Child:
    """A curve's process, which waits for a line before it touches the GPU."""

    precision: str
    seed: int
    process: "subprocess.Popen[str]"
    result: Path

    @classmethod
    def start(cls, precision: str, seed: int, work: str) -> "Child":
        result = Path(work, f"{precision}_{seed}.json")
        options = ["--only", precision, "--seed", str(seed), "--work", work, "--result", str(result)]
        process = subprocess.Popen([sys.executable, *sys.argv, *options], stdin=subprocess.PIPE, text=True)
        return cls(precision, seed, process, result)

    def run(self) -> list[float]:
        """Raises CalledProcessError if it fails."""
        self.process.communicate("go\n")
        if self.process.returncode:
            raise subprocess.CalledProcessError(self.process.returncode, self.process.args)
        losses: list[float] = json.loads(self.result.read_text())
        return losses


def model_config(data: str) -> tuple[ModelConfig, bool]:
    """The model of the data, and whether it sees images."""
    if Path(data, "model", "config.json").exists():
        return small(data), True
    return SIZES["Qwen2.5-0.5B"], False


def train(args: argparse.Namespace) -> list[float]:
    from trainer.optim.optimizer import learning_rate
    from trainer.planning import planner
    from trainer.runtime import Runtime
    from trainer.trainer import Run, Trainer

    input()
    model, images = model_config(args.data)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=str(model_folder((hf_config if images else text_config)(model), args.data, Path(folder, "hf"))),
            data=str(Path(args.work, "train")),
            validation=str(Path(args.work, "held_out")),
            output=str(Path(folder, "out")),
            length=args.length,
            global_batch=1,
            steps=args.steps,
            lr=3e-4,
            warmup_steps=max(1, args.steps // 10),
            seed=args.seed,
        )
        planner.FP8_HIDDEN = 0 if args.only == "fp8" else 1 << 30
        run = Run.prepare(config, 1, torch.cuda.is_available())
        with Runtime.start(seed=config.seed) as runtime, Trainer(run, runtime) as trainer:
            steps = enumerate(islice(trainer.stream.batches(0), args.steps))
            losses = [trainer.train_step(batch, learning_rate(config, n, args.steps)).loss for n, batch in steps]
            held_out = trainer.held_out_loss()
    assert held_out is not None
    return [*losses, held_out.mean]


def table(curves: Curves, steps: int) -> str:
    """Mean losses of a tenth of the steps here and there, each with the spread over the seeds."""
    tenth = steps // 10
    lines = [
        "| mean loss of steps | bf16, by seed | fp8, by seed | fp8 - bf16, mean and deviation |",
        "|---|--:|--:|--:|",
    ]
    seeds = [seed for seed in sorted({s for _, s in curves}) if all((p, seed) in curves for p in PRECISIONS)]
    for first in (*range(0, steps, max(1, steps // 4)), steps - tenth, steps):
        last = min(first + tenth, steps + 1)
        means = {p: [fmean(curves[p, seed][first:last]) for seed in seeds] for p in PRECISIONS}
        apart = [fp8 - bf16 for bf16, fp8 in zip(means["bf16"], means["fp8"], strict=True)]
        shown = [", ".join(f"{m:.4f}" for m in means[p]) for p in PRECISIONS]
        spread = f" ± {stdev(apart):.4f}" if len(apart) > 1 else ""
        what = "held-out packs, after the last" if first == steps else f"{first + 1} to {last}"
        lines.append(f"| {what} | {' | '.join(shown)} | {fmean(apart):+.4f}{spread} |")
    return "\n".join(lines)


def smoothed(values: list[float]) -> list[float]:
    return [fmean(values[max(0, n - SMOOTH + 1) : n + 1]) for n in range(len(values))]


def draw(curves: Curves, steps: int) -> str:
    """Two panels: bands of the losses, and of what fp8 adds to them, each from the least to the most of the seeds."""
    bands = {p: [smoothed(v[:steps]) for (q, _), v in curves.items() if q == p] for p in PRECISIONS}
    seeds = [seed for seed in sorted({s for _, s in curves}) if all((p, seed) in curves for p in PRECISIONS)]
    apart = [
        smoothed([a - b for a, b in zip(curves["fp8", s][:steps], curves["bf16", s][:steps], strict=True)])
        for s in seeds
    ]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 560" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    parts += _panel(20, 300, {f"{p}, {len(b)} seeds": (b, COLOURS[p]) for p, b in bands.items() if b}, 1.0)
    if apart:
        parts += _panel(350, 160, {"fp8 - bf16 of the same seed": (apart, "#8250df")}, 0.01)
    parts.append(f'<text x="50" y="548">step 1 to {steps}, loss a trained token, mean of {SMOOTH} steps</text></svg>')
    return "\n".join(parts)


def _panel(top: int, height: int, bands: dict[str, tuple[list[list[float]], str]], unit: float) -> list[str]:
    # The first steps would leave no room for the rest.
    values = [v for curves, _ in bands.values() for curve in curves for v in curve[len(curve) // 20 :]]
    low, high = min(values), max(values)
    while (high - low) / unit > 8:
        unit *= 2
    parts = [
        f'<svg x="0" y="{top}" width="720" height="{height}" viewBox="0 0 720 {height}">'
    ]  # cuts off what is above

    def y(value: float) -> float:
        return (high - value) / (high - low or 1) * (height - 10) + 5

    for tick in range(-int(-low // unit), int(high // unit) + 1):
        at, name = y(tick * unit), f"{tick * unit:g}"
        parts.append(f'<path d="M50 {at:.1f}H700" stroke="#ddd"/><text x="8" y="{at + 4:.1f}">{name}</text>')
    for row, (name, (curves, colour)) in enumerate(bands.items()):
        columns = list(zip(*curves, strict=True))
        edge = [*enumerate(map(max, columns)), *reversed(list(enumerate(map(min, columns))))]
        for kind, line in (("polygon", edge), ("polyline", list(enumerate(map(fmean, columns))))):
            points = " ".join(f"{50 + n / len(columns) * 650:.1f},{y(v):.1f}" for n, v in line)
            style = f'fill="{colour}" fill-opacity="0.2"' if kind == "polygon" else f'fill="none" stroke="{colour}"'
            parts.append(f'<{kind} points="{points}" {style}/>')
        parts.append(f'<text x="480" y="{20 + 18 * row}" font-size="13" fill="{colour}">{name}</text>')
    return [*parts, "</svg>"]


def write(curves: Curves, steps: int, out: Path) -> None:
    with (out / "losses.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{precision} seed {seed}" for precision, seed in curves)])
        rows = zip(*curves.values(), strict=True)
        writer.writerows(
            ["held out" if n == steps else n + 1, *(round(v, 5) for v in row)] for n, row in enumerate(rows)
        )
    (out / "losses.svg").write_text(draw(curves, steps))


def read(path: Path) -> Curves:
    """Return what `write` has written there."""
    if not path.exists():
        return {}
    with path.open() as file:
        (_, *names), *rows = csv.reader(file)
    keys = [(precision, int(seed)) for precision, _, seed in map(str.split, names)]
    return {key: [float(row[1 + column]) for row in rows] for column, key in enumerate(keys)}


def main(args: argparse.Namespace) -> None:
    begun, out = time.monotonic(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    curves = read(out / "losses.csv")
    wanted = [key for seed in args.seeds for precision in PRECISIONS if (key := (precision, seed)) not in curves]
    if not wanted:
        print(table(curves, args.steps))
        return
    with tempfile.TemporaryDirectory() as work:
        children = [Child.start(*wanted[0], work)]
        try:
            make(Path(args.data, "model"), Path(work), args.steps, HELD_OUT, args.length)
            print(f"{args.steps} packs made after {time.monotonic() - begun:.0f} s", flush=True)
            for number, (precision, seed) in enumerate(wanted):
                children += [Child.start(*following, work) for following in wanted[number + 1 : number + 2]]
                started = time.monotonic()
                curves[precision, seed] = children[number].run()
                write(curves, args.steps, out)
                taken = time.monotonic() - started
                print(f"{precision}, seed {seed}: {taken:.0f} s", flush=True)
                if number + 1 < len(wanted) and time.monotonic() + taken - begun > args.seconds:
                    print(f"left out, for {args.seconds} s: {wanted[number + 1 :]}")
                    break
        finally:
            for child in children:
                child.process.kill()
                child.process.wait()
    if all((precision, args.seeds[0]) in curves for precision in PRECISIONS):
        print(table(curves, args.steps))


if __name__ == "__main__":
    parser = Parser(description=__doc__, example="python benchmarks/losses.py DATA OUT --seeds 0 1")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--length", type=int, default=LENGTH, help=argparse.SUPPRESS)  # shorter on a CPU
    for name in ("only", "work", "result"):  # of a child
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        losses = train(args)
        Path(args.result).write_text(json.dumps(losses))
    else:
        main(args)
