"""Training Qwen2.5-VL or Qwen3-VL on one GPU: whole steps of ours, and of Hugging Face + Liger on the same packs.

usage: python benchmarks/train_vision.py DATA [--size Qwen3-VL-4B] [--rows 2 4 6 mix] [--precisions bf16 fp8]
DATA is what vision_data.py wrote for the same family; a row is the number of pictures in a pack. Each run is a separate
process, one after the other, on the same card. A step is all of it: reading packs, decoding pictures, forward,
backward, clipping, optimizer. FLOPs are the model's, language and vision tower, without padding and recomputation
(trainer/models/costs.py). The peer is given our packing and FlashAttention for segments, windows and whole images,
Liger's kernels, torch's fused AdamW in bfloat16; where it runs out of memory, it checkpoints activations.
"""

import argparse
import sys
import time
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.side_by_side import Peer, main, train
from benchmarks.train_text import LENGTH, flash_attention, model_folder
from benchmarks.vision_models import FAMILIES, SIZES, add_kernels, hf_config
from kanyun.cli.parser import Parser
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.models.config import ModelConfig

STEPS = 1000  # of the schedule


def config_of(args: argparse.Namespace, folder: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder(hf_config(SIZES[args.size]), args.data, folder / "hf")),
        data=f"{args.data}/packed/{args.row}",
        output=str(folder / "out"),
        length=LENGTH,
        global_batch=args.global_batch,
        steps=STEPS,
        lr=1e-4,
        warmup_steps=100,
    )


def ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return train(args, config_of(args, folder))


def packed_attention(model_type: str) -> None:
    """Give transformers FlashAttention, as torch ships it, for a pack's samples and for the tower's windows and images,
    which it would attend to one after the other if it did not take this for a FlashAttention.
    """
    from transformers import AttentionInterface

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        # [1, heads, T, D] -> [T, heads, D]; rope gives float32 under autocast
        q, k, v = (x[0].transpose(0, 1).bfloat16() for x in (q, k, v))
        if "cu_seq_lens_q" in kwargs:  # in the vision tower
            ends, longest, causal = kwargs["cu_seq_lens_q"], kwargs["max_length_q"], False
        else:
            ends, longest, causal = kwargs["pack_ends"], kwargs["pack_longest"], True
        return flash_attention(q, k, v, ends, int(longest), causal=causal)[None], None

    AttentionInterface.register("packed", attention)
    modeling: Any = import_module(FAMILIES[model_type].modeling)
    modeling.is_flash_attention_requested = lambda config: True


def inputs(batch: Batch, model_config: ModelConfig) -> dict[str, Any]:
    """A batch of ours, of one pack, as transformers' model takes it."""
    vision, slots, tower = batch.vision, len(batch.input_ids), model_config.vision
    assert vision is not None
    assert tower is not None
    unit = tower.merge_size**2  # patches a visual token
    used = int((vision.token_index < slots).sum())  # visual tokens
    order = vision.token_index[:used].argsort()  # transformers brings them into window order itself
    mean, std = (255 * torch.tensor(x) for x in (tower.image_mean, tower.image_std))
    patches = vision.patches[: used * unit].unflatten(0, (used, unit))[order].flatten(0, 1)
    pixels = (patches.unflatten(1, (3, -1)) - mean[:, None]) / std[:, None]  # [P, 3, side * side]
    ends = [end for end in vision.segments["images"].tolist() if end <= used * unit]
    grids = [(1, *(vision.per_patch["positions"][a:b].amax(0) + 1).tolist()) for a, b in pairwise(ends) if a < b]
    found: dict[str, Any] = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[:, None],
        "shift_labels": torch.where(batch.loss_mask > 0, batch.labels, -100)[None],
        "pixel_values": pixels[:, :, None].expand(-1, -1, 2, -1).flatten(1).bfloat16(),  # both frames of a picture
        "image_grid_thw": torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        "pack_ends": batch.cu_seqlens,
        "pack_longest": int(batch.cu_seqlens.diff().max()),
        "max_seqlen": max((rows * columns for _, rows, columns in grids), default=0),
        "max_window_seqlen": 64,
        "use_cache": False,
    }
    if not grids:
        del found["pixel_values"], found["image_grid_thw"]
    return found


def peer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = config_of(args, folder)
    model_type = ModelConfig.from_hf(config.model).model_type
    packed_attention(model_type)
    add_kernels(model_type)
    try:
        return train_peer(args, config, checkpointed=False)
    except torch.OutOfMemoryError:
        pass  # outside of the handler, which holds the frames and with them the model
    torch.cuda.empty_cache()
    return train_peer(args, config, checkpointed=True)


def train_peer(args: argparse.Namespace, config: TrainConfig, checkpointed: bool) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from kanyun.fingerprint import fingerprint
    from kanyun.storage import Folder
    from trainer.data.batch import BatchFormat
    from trainer.data.source import PackedData
    from trainer.data.stream import PackStream
    from trainer.models.costs import TRAINING
    from trainer.models.registry import costs_of

    torch.cuda.reset_peak_memory_stats()
    data = PackedData(config.data, LENGTH, fingerprint(Folder(config.model)))
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(config.model), attn_implementation="packed", dtype=torch.bfloat16
        )
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model_config = ModelConfig.from_hf(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)

    seconds, flops, loss = [], [], 0.0
    with PackStream(
        data, BatchFormat.of(model_config), seed=0, global_batch=args.global_batch, micro_batch=1
    ) as stream:
        begun = time.perf_counter()
        for batches in islice(stream.batches(0), args.peer_steps + 1):
            flops.append(sum(TRAINING * costs_of(model_config).forward_flops(batch) for batch in batches))
            for batch in batches:
                given = inputs(batch, model_config)
                given = {name: x.to("cuda") if isinstance(x, Tensor) else x for name, x in given.items()}
                out = model(labels=given["shift_labels"], **given)
                (out.loss / len(batches)).backward()
                loss = out.loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - begun)
            begun = now
    counted = sum(seconds[1:])
    manifests = [dataset.manifest for dataset in data.datasets]
    useful = args.global_batch * sum(m.tokens for m in manifests) / sum(m.packs for m in manifests)
    return {
        "tokens/s": useful * len(seconds[1:]) / counted,
        "TFLOP/s": sum(flops[1:]) / counted / 1e12,
        "memory GB": torch.cuda.max_memory_reserved() / 1e9,
        "checkpointed": checkpointed,
        "losses": [round(loss, 3)],
    }


if __name__ == "__main__":
    about = Parser(description=__doc__, example="python benchmarks/train_vision.py DATA --size Qwen3-VL-4B --rows 4")
    about.add_argument("--size", default="Qwen2.5-VL-3B")
    main(about, "row", ["2", "4", "6"], ours, {"liger": Peer("Hugging Face + Liger", peer)})
