"""Training Qwen2.5-VL on one GPU: whole steps of ours, and of Hugging Face + Liger kernels on the same packs.

usage: python benchmarks/train_vision.py DATA [--rows 2 4 6 mix] [--precisions bf16 fp8] [--steps 4] [--ours-only]
DATA is what vision_data.py wrote; a row is the number of pictures in a pack. Each run is a separate process, one
after the other, on the same card. A step is all of it: reading packs, decoding pictures, forward, backward,
clipping, optimizer. FLOPs are the model's, language and vision tower, without padding and recomputation
(trainer/models/costs.py). The peer is given our packing and FlashAttention for segments, windows and whole images,
Liger's kernels, torch's fused AdamW in bfloat16; for 6 pictures it must checkpoint activations, or it runs out of
memory.
"""

import argparse
import sys
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.side_by_side import main, train
from benchmarks.train_text import LENGTH, flash_attention, model_folder, text_config
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.models.config import ModelConfig
from trainer.models.qwen2_5.sizes import SIZES

CHECKPOINTED = {"6", "mix"}  # rows that the peer has no memory for otherwise
STEPS = 1000  # of the schedule


def hf_config(model_config: ModelConfig) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL, as the hub has it."""
    vision = model_config.vision
    assert vision is not None
    return {
        **text_config(model_config),
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "rope_scaling": {"type": "mrope", "mrope_section": list(model_config.mrope_section)},
        "dtype": "bfloat16",
        "image_token_id": model_config.image_token_id,
        "video_token_id": 151_656,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "vision_config": {
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "out_hidden_size": vision.out_hidden_size,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
            "hidden_act": "silu",
            "in_chans": vision.channels,
        },
    }


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


def packed_attention() -> None:
    """Give transformers FlashAttention, as torch ships it, for a pack's samples and for the tower's windows and images,
    which it would attend to one after the other if it did not take this for a FlashAttention.
    """
    from transformers import AttentionInterface
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

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
    modeling_qwen2_5_vl.is_flash_attention_requested = lambda config: True


def inputs(batch: Batch, unit: int) -> dict[str, Any]:
    """A batch of ours, of one pack, as transformers' Qwen2.5-VL takes it. unit: patches a visual token."""
    vision, slots = batch.vision, len(batch.input_ids)
    assert vision is not None
    used = int((vision.token_index < slots).sum())  # visual tokens
    order = vision.token_index[:used].argsort()  # transformers brings them into window order itself
    mean, std = (
        255 * torch.tensor(x) for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    patches = vision.patches[: used * unit].unflatten(0, (used, unit))[order].flatten(0, 1)
    pixels = (patches.unflatten(1, (3, -1)) - mean[:, None]) / std[:, None]  # [P, 3, 14 * 14]
    ends = [end for end in vision.cu_images.tolist() if end <= used * unit]
    grids = [(1, *(vision.positions[a:b].amax(0) + 1).tolist()) for a, b in pairwise(ends) if a < b]
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
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    from kanyun.fingerprint import fingerprint
    from kanyun.storage import Folder
    from trainer.data.batch import BatchFormat
    from trainer.data.source import PackedData
    from trainer.data.stream import PackStream
    from trainer.models.costs import TRAINING
    from trainer.models.registry import costs_of

    packed_attention()
    apply_liger_kernel_to_qwen2_5_vl()
    # transformers 5 puts the three axes of mrope together before it: the plain kernel is the one that fits.
    modeling_qwen2_5_vl.apply_rotary_pos_emb = liger_rotary_pos_emb
    config = config_of(args, folder)
    data = PackedData(config.data, LENGTH, fingerprint(Folder(config.model)))
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(config.model), attn_implementation="packed", dtype=torch.bfloat16
        )
    model.train()
    if args.row in CHECKPOINTED:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model_config = ModelConfig.from_hf(config.model)
    assert model_config.vision is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)

    seconds, flops, loss = [], [], 0.0
    with PackStream(
        data, BatchFormat.of(model_config), seed=0, global_batch=args.global_batch, micro_batch=1
    ) as stream:
        begun = time.perf_counter()
        for batches in islice(stream.batches(0), args.peer_steps + 1):
            flops.append(sum(TRAINING * costs_of(model_config).forward_flops(batch) for batch in batches))
            for batch in batches:
                given = inputs(batch, model_config.vision.merge_size**2)
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
        "checkpointed": args.row in CHECKPOINTED,
        "losses": [round(loss, 3)],
    }


if __name__ == "__main__":
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--size", default="Qwen2.5-VL-3B")
    main(about, "row", ["2", "4", "6"], ours, peer)
