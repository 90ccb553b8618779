"""200 steps of a small Qwen2.5-VL or Qwen3-VL from the same weights: ours in bfloat16 and fp8, transformers.

usage: python benchmarks/vision_curves.py DATA OUT [--steps 200] [--global-batch 2]
DATA is what vision_data.py wrote, of which it takes the family and the mix. Writes OUT/losses.csv and OUT/losses.svg.
As in loss_curves.py, transformers' random weights reach our trainer by `python -m convert to-megatron` and `init:`;
transformers keeps float32 weights under autocast and torch's AdamW, and is told where samples and windows end.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.loss_curves import main, plain_loop
from benchmarks.train_text import LENGTH, model_folder
from benchmarks.train_vision import inputs, packed_attention
from benchmarks.vision_models import FAMILIES, hf_config
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.models.config import ModelConfig


def small(data: str) -> ModelConfig:
    """The small model of the data's family."""
    return FAMILIES[json.loads(Path(data, "model", "config.json").read_text())["model_type"]].small


def config(args: argparse.Namespace, folder: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder(hf_config(small(args.data)), args.data, folder / "hf")),
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

    packed_attention(small(args.data).model_type)
    model = AutoModelForImageTextToText.from_pretrained(
        Path(args.work) / "hf", attn_implementation="packed", dtype=torch.float32
    ).to("cuda")

    def logits(pack: Batch) -> Tensor:
        given = inputs(pack, small(args.data))
        del given["shift_labels"]
        given = {name: x.to("cuda") if isinstance(x, Tensor) else x for name, x in given.items()}
        found: Tensor = model(**given).logits[0]
        return found

    return plain_loop(args, config, model, logits)


if __name__ == "__main__":
    example = "python benchmarks/vision_curves.py DATA OUT --steps 100"
    main(__doc__, example, "AutoModelForImageTextToText", 200, config, transformers)
