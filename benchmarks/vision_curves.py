"""200 steps of a small Qwen2.5-VL from the same weights on the same packs: ours in bfloat16 and fp8, transformers.

usage: python benchmarks/vision_curves.py DATA OUT [--steps 200] [--global-batch 2]
DATA is what vision_data.py wrote, of which it takes the mix. Writes OUT/losses.csv and OUT/losses.svg. As in
loss_curves.py, transformers' random weights reach our trainer by `python -m convert to-megatron` and `init:`;
transformers keeps float32 weights under autocast and torch's AdamW, and is told where samples and windows end.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.loss_curves import main, plain_loop
from benchmarks.train_text import LENGTH, model_folder
from benchmarks.train_vision import hf_config, inputs, packed_attention
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.models.qwen2_5.sizes import SIZES

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
        model=str(model_folder(hf_config(SMALL), args.data, folder / "hf")),
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

    packed_attention()
    model = AutoModelForImageTextToText.from_pretrained(
        Path(args.work) / "hf", attn_implementation="packed", dtype=torch.float32
    ).to("cuda")

    def logits(pack: Batch) -> Tensor:
        given = inputs(pack, _VL.vision.merge_size**2)
        del given["shift_labels"]
        given = {name: x.to("cuda") if isinstance(x, Tensor) else x for name, x in given.items()}
        found: Tensor = model(**given).logits[0]
        return found

    return plain_loop(args, config, model, logits)


if __name__ == "__main__":
    main(__doc__, "AutoModelForImageTextToText", 200, config, transformers)
