"""Training Qwen2.5 on one GPU: whole steps of ours, and of Hugging Face + Liger kernels on the same packs.

usage: python benchmarks/train_text.py DATA [--models 0.5B 1.5B 3B] [--precisions bf16 fp8] [--ours-only] [--profile]
DATA is what text_data.py wrote. Each run is a separate process, one after the other, on the same card. A step is all
of it: reading packs, forward, backward, clipping, optimizer. FLOPs are the model's (trainer/models/costs.py), MFU is
against the card's dense bfloat16 peak. The peer is given our packing: samples laid end to end, attention by
FlashAttention's variable-length kernel, Liger's fused norm, rope, SwiGLU and linear cross entropy, torch's fused AdamW.
"""

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.side_by_side import main, train
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig
from trainer.models.qwen2_5.sizes import SIZES

LENGTH = 8192


def text_config(model_config: ModelConfig) -> dict[str, Any]:
    """config.json of a Qwen2.5, as the hub has it."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": model_config.vocab_size,
        "hidden_size": model_config.hidden_size,
        "intermediate_size": model_config.intermediate_size,
        "num_hidden_layers": model_config.num_layers,
        "num_attention_heads": model_config.num_heads,
        "num_key_value_heads": model_config.num_kv_heads,
        "max_position_embeddings": model_config.max_positions,
        "rms_norm_eps": model_config.norm_eps,
        "rope_theta": model_config.rope_theta,
        "tie_word_embeddings": model_config.tied,
        "hidden_act": "silu",
    }


def model_folder(config: dict[str, Any], data: str, folder: Path) -> Path:
    """A Hugging Face folder with this config.json and the tokenizer and processor settings of the data; no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for file in Path(data, "model").iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    return folder


def config_of(args: argparse.Namespace, folder: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder(text_config(SIZES[f"Qwen2.5-{args.model}"]), args.data, folder / "hf")),
        data=f"{args.data}/stages/packed",
        output=str(folder / "out"),
        length=LENGTH,
        global_batch=args.global_batch,
        steps=1000,
        lr=3e-4,
        warmup_steps=100,
    )


def ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return train(args, config_of(args, folder))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, *, causal: bool) -> Tensor:
    """FlashAttention 2 as torch ships it, within segments. q [T, heads, D]; k and v [T, groups, D]."""
    from torch.nn.attention.varlen import varlen_attn

    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:  # it has no grouped heads, and repeating once would be a copy
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0) if causal else (-1, -1))
    assert isinstance(out, Tensor)
    return out


def packed_attention() -> None:
    """Give transformers an attention that is told where a pack's samples end."""
    from transformers import AttentionInterface

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1).bfloat16() for x in (q, k, v))
        return flash_attention(q, k, v, kwargs["cu_seqlens"], kwargs["longest"], causal=True)[None], None

    AttentionInterface.register("packed", attention)


def peer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2
    from transformers import AutoConfig, AutoModelForCausalLM

    from kanyun.fingerprint import fingerprint
    from kanyun.storage import Folder
    from trainer.data.batch import BatchFormat
    from trainer.data.source import PackedData
    from trainer.data.stream import PackStream
    from trainer.models.config import ModelConfig
    from trainer.models.costs import TRAINING
    from trainer.models.registry import costs_of
    from trainer.planning.gpus import find_gpu

    packed_attention()
    apply_liger_kernel_to_qwen2()
    config = config_of(args, folder)
    data = PackedData(config.data, LENGTH, fingerprint(Folder(config.model)))
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config.model), attn_implementation="packed", dtype=torch.bfloat16
        )
    model_config = ModelConfig.from_hf(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    seconds, flops, useful = [], 0, 0
    with PackStream(
        data, BatchFormat.of(model_config), seed=0, global_batch=args.global_batch, micro_batch=1
    ) as stream:
        for batches in islice(stream.batches(0), args.peer_steps + 1):
            begun, flops, useful = time.perf_counter(), 0, 0
            for batch in batches:
                flops += TRAINING * costs_of(model_config).forward_flops(batch)
                longest = int(batch.cu_seqlens.diff().max())
                batch = batch.to(torch.device("cuda"))
                labels = torch.where(batch.loss_mask > 0, batch.labels, -100)[None]
                out = model(
                    input_ids=batch.input_ids[None],
                    position_ids=batch.position_ids[:1],
                    labels=labels,
                    shift_labels=labels,
                    cu_seqlens=batch.cu_seqlens,
                    longest=longest,
                    use_cache=False,
                )
                (out.loss / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
    step = median(seconds[1:])
    manifests = [dataset.manifest for dataset in data.datasets]
    useful = args.global_batch * sum(m.tokens for m in manifests) / sum(m.packs for m in manifests)
    return {
        "tokens/s": useful / step,
        "TFLOP/s": flops / step / 1e12,
        "MFU": flops / step / find_gpu(torch.cuda.get_device_name()).flops,
        "memory GB": torch.cuda.max_memory_reserved() / 1e9,
        "losses": [round(out.loss.item(), 3)],
    }


if __name__ == "__main__":
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main(about, "model", ["0.5B", "1.5B", "3B"], ours, peer)
