"""300 steps from the same weights on the same packs: ours in bfloat16 and in fp8, transformers with torch's AdamW.

usage: python benchmarks/loss_curves.py DATA OUT [--steps 300] [--global-batch 2]
DATA is what text_data.py wrote. Writes OUT/losses.csv and OUT/losses.svg. The weights are transformers' random ones, in
bfloat16, which reach our trainer the way a user's do: `python -m convert to-megatron`, then `init:`. transformers keeps
float32 copies and computes under autocast; its attention is told where samples end, so that each is as if alone.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.train_text import LENGTH, config_of, packed_attention
from kanyun.cli.parser import Parser
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.optim.optimizer import learning_rate
from trainer.planning import planner

RUNS = ("bf16", "fp8", "transformers")
COLOURS = ("#1f6feb", "#d1242f", "#888888", "#2da44e", "#bf8700", "#8250df")  # of curves, in their order


def config(args: argparse.Namespace, folder: Path) -> TrainConfig:
    args.model = "0.5B"
    changes = {"steps": args.steps, "warmup_steps": 20, "init": str(Path(args.work) / "init")}
    return config_of(args, folder).model_copy(update=changes)


def ours(args: argparse.Namespace, config: TrainConfig) -> list[float]:
    from trainer.runtime import Runtime
    from trainer.trainer import Run, Trainer

    planner.FP8_HIDDEN = 0 if args.only == "fp8" else 1 << 30
    run = Run.prepare(config, 1, torch.cuda.is_available())
    with Runtime.start() as runtime, Trainer(run, runtime) as trainer:
        batches = islice(trainer.stream.batches(0), args.steps)
        return [trainer.train_step(b, learning_rate(config, n, args.steps)).loss for n, b in enumerate(batches)]


def transformers(args: argparse.Namespace, config: TrainConfig) -> list[float]:
    from transformers import AutoModelForCausalLM

    packed_attention()
    model = AutoModelForCausalLM.from_pretrained(
        Path(args.work) / "hf", attn_implementation="packed", dtype=torch.float32
    ).to("cuda")

    def logits(pack: Batch) -> Tensor:
        batch = pack.to(torch.device("cuda"))
        ends: dict[str, Any] = {"cu_seqlens": batch.cu_seqlens, "longest": LENGTH, "use_cache": False}
        hidden = model.model(batch.input_ids[None], position_ids=batch.position_ids[:1], **ends)[0][0]
        found: Tensor = model.lm_head(hidden)
        return found

    return plain_loop(args, config, model, logits)


def plain_loop(
    args: argparse.Namespace, config: TrainConfig, model: Any, logits: Callable[[Batch], Tensor]
) -> list[float]:
    """Losses of a model of transformers on our packs, `logits` [T, vocabulary] of each, by torch's AdamW."""
    from kanyun.fingerprint import fingerprint
    from kanyun.storage import Folder
    from trainer.data.batch import BatchFormat
    from trainer.data.source import PackedData
    from trainer.data.stream import PackStream
    from trainer.models.config import ModelConfig
    from trainer.models.registry import costs_of

    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
    data = PackedData(config.data, LENGTH, fingerprint(Folder(config.model)))
    model_config = ModelConfig.from_hf(config.model)
    order = {
        "seed": config.seed,
        "global_batch": config.global_batch,
        "cost": costs_of(model_config).pack_cost,
    }  # as Trainer's
    losses = []
    with PackStream(data, BatchFormat.of(model_config), micro_batch=1, **order) as stream:
        for step, packs in enumerate(islice(stream.batches(0), args.steps)):
            trained = sum(int(pack.loss_mask.sum()) for pack in packs)
            total: Tensor | float = 0.0
            for pack in packs:
                labels = torch.where(pack.loss_mask > 0, pack.labels, -100).to(model.device)
                with torch.autocast(model.device.type, torch.bfloat16):
                    guessed = logits(pack)
                loss = torch.nn.functional.cross_entropy(guessed.float(), labels, reduction="sum") / trained
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total))
    return losses


def make_weights(source: Path, auto: str, work: Path) -> None:
    """transformers' random weights for the folder `source` in work/hf; in work/init as a checkpoint of ours."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(transformers.AutoConfig.from_pretrained(source))
    model.to(torch.bfloat16).save_pretrained(work / "hf")
    for file in source.iterdir():
        if not (work / "hf" / file.name).exists():
            (work / "hf" / file.name).write_bytes(file.read_bytes())
    subprocess.run([sys.executable, "-m", "convert", "to-megatron", work / "hf", work / "init"], check=True)


def draw(losses: dict[str, list[float]], smooth: int = 10) -> str:
    """Curves, each the mean of `smooth` steps, as an SVG."""
    width, height, steps = 720, 360, len(next(iter(losses.values())))
    top = max(max(values) for values in losses.values())
    low = min(min(values) for values in losses.values()) - 0.2
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    for tick in range(int(low) + 1, int(top) + 1):
        y = 20 + (top - tick) / (top - low) * 300
        parts.append(
            f'<path d="M40 {y:.1f}H700" stroke="#eee"/><text x="10" y="{y + 4:.1f}" font-size="12">{tick}</text>'
        )
    for row, (name, values) in enumerate(losses.items()):
        means = [sum(values[max(0, n - smooth + 1) : n + 1]) / min(smooth, n + 1) for n in range(steps)]
        points = " ".join(
            f"{40 + n / steps * 660:.1f},{20 + (top - v) / (top - low) * 300:.1f}" for n, v in enumerate(means)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[row]}" stroke-width="1.5"/>')
        label = f"{name}: {sum(values[-20:]) / 20:.3f} over the last 20 steps"
        parts.append(f'<text x="420" y="{40 + 18 * row}" font-size="13" fill="{COLOURS[row]}">{label}</text>')
    parts.append(f'<text x="40" y="345" font-size="12">step 1 to {steps}, loss a trained token</text></svg>')
    return "\n".join(parts)


def write(losses: dict[str, list[float]], out: Path) -> None:
    with (out / "losses.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *losses])
        writer.writerows([n + 1, *(round(v, 5) for v in row)] for n, row in enumerate(zip(*losses.values())))
    (out / "losses.svg").write_text(draw(losses))


def main(
    about: str | None,
    example: str,
    auto: str,
    steps: int,
    config: Callable[[argparse.Namespace, Path], TrainConfig],
    transformers: Callable[[argparse.Namespace, TrainConfig], list[float]],
) -> None:
    """The command line: all RUNS, each in a separate process. `auto`: transformers' class for the model."""
    parser = Parser(description=about, example=example)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--global-batch", type=int, default=2)
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)  # a child of the very script
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = Path(args.out)
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            run = transformers if args.only == "transformers" else ours
            (out / f"{args.only}.json").write_text(json.dumps(run(args, config(args, Path(folder)))))
        return
    out.mkdir(parents=True, exist_ok=True)
    losses = {}
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as folder:
        args.work = work
        make_weights(Path(config(args, Path(folder)).model), auto, Path(work))
        for only in RUNS:
            subprocess.run([sys.executable, *sys.argv, "--only", only, "--work", work], check=True)
            losses[only] = json.loads((out / f"{only}.json").read_text())
            (out / f"{only}.json").unlink()
            print(only, "last 20 steps:", round(sum(losses[only][-20:]) / 20, 4), flush=True)
            write(losses, out)


if __name__ == "__main__":
    example = "python benchmarks/loss_curves.py DATA OUT --steps 100"
    main(__doc__, example, "AutoModelForCausalLM", 300, config, transformers)
