"""200 steps of a small Qwen2.5-VL from the same weights on the same packs: ours in bfloat16 and fp8, transformers.

usage: python benchmarks/vision_curves.py DATA OUT [--steps 200] [--global-batch 2]
DATA is what vision_data.py wrote, of which it takes the mix. Writes OUT/losses.csv and OUT/losses.svg. As in
loss_curves.py, transformers' random weights reach our trainer by `python -m convert to-megatron` and `init:`;
transformers keeps float32 weights under autocast and torch's AdamW, and is told where samples and windows end.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.loss_curves import RUNS, draw, ours
from benchmarks.train_text import LENGTH
from benchmarks.train_vision import inputs, model_folder, packed_attention
from trainer.config import TrainConfig
from trainer.model.sizes import SIZES
from trainer.optimizer import learning_rate

_TEXT, _VL = SIZES["Qwen2.5-0.5B"], SIZES["Qwen2.5-VL-3B"]
assert _VL.vision is not None
# 0.5B's widths and the tower's, heads of 64 and 80 channels, fewer layers: full attention in one of six blocks.
SMALL = replace(
    _TEXT,
    num_layers=8,
    mrope_section=(8, 12, 12),
    image_token_id=_VL.image_token_id,
    vision=replace(_VL.vision, depth=6, out_hidden_size=_TEXT.hidden_size, full_attention_blocks=(3,)),
)


def config(args: argparse.Namespace, folder: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder(SMALL, args.data, folder / "hf")),
        init=str(Path(args.work) / "init"),
        data=f"{args.data}/packed/mix",
        output=str(folder / "out"),
        length=LENGTH,
        global_batch=args.global_batch,
        steps=args.steps,
        lr=3e-4,
        warmup_steps=20,
    )


def transformers(args: argparse.Namespace, config: TrainConfig) -> list[float]:
    from transformers import AutoModelForImageTextToText

    from kanyun.fingerprint import fingerprint
    from kanyun.storage import Folder
    from trainer.data.source import PackedData
    from trainer.data.stream import PackStream
    from trainer.flops import pack_cost
    from trainer.layout import batch_format
    from trainer.model import ModelConfig

    packed_attention()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForImageTextToText.from_pretrained(
        Path(args.work) / "hf", attn_implementation="packed", dtype=torch.float32
    ).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
    facts = ModelConfig.from_hf(config.model)
    assert facts.vision is not None
    data = PackedData(config.data, LENGTH, fingerprint(Folder(config.model)))
    order = {"seed": config.seed, "global_batch": config.global_batch, "cost": pack_cost(facts)}  # as Trainer's
    losses = []
    with PackStream(data, batch_format(facts), micro_batch=1, **order) as stream:
        for step, packs in enumerate(islice(stream.batches(0), args.steps)):
            trained = sum(int(pack.loss_mask.sum()) for pack in packs)
            total: Tensor | float = 0.0
            for pack in packs:
                given = inputs(pack, facts.vision.merge_size**2)
                given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
                labels = given.pop("shift_labels")[0]
                with torch.autocast(device.type, torch.bfloat16):
                    logits = model(**given).logits[0]
                loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / trained
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total))
    return losses


def make_weights(args: argparse.Namespace, work: Path) -> None:
    """transformers' random weights in work/hf, the same as a checkpoint of ours in work/init."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with tempfile.TemporaryDirectory() as folder:
        source = model_folder(SMALL, args.data, Path(folder) / "hf")
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source))
        model.to(torch.bfloat16).save_pretrained(work / "hf")
        for file in source.iterdir():
            if not (work / "hf" / file.name).exists():
                (work / "hf" / file.name).write_bytes(file.read_bytes())
    subprocess.run([sys.executable, "-m", "convert", "to-megatron", work / "hf", work / "init"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--global-batch", type=int, default=2)
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)  # a child of this very script
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
    with tempfile.TemporaryDirectory() as work:
        args.work = work
        make_weights(args, Path(work))
        for only in RUNS:
            subprocess.run([sys.executable, *sys.argv, "--only", only, "--work", work], check=True)
            losses[only] = json.loads((out / f"{only}.json").read_text())
            (out / f"{only}.json").unlink()
            print(only, "last 20 steps:", round(sum(losses[only][-20:]) / 20, 4), flush=True)
    with (out / "losses.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *losses])
        writer.writerows([n + 1, *(round(v, 5) for v in row)] for n, row in enumerate(zip(*losses.values())))
    (out / "losses.svg").write_text(draw(losses))


if __name__ == "__main__":
    main()
