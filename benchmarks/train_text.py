"""Training Qwen on one GPU: whole steps of ours, and of its peers on the same packs.

usage: python benchmarks/train_text.py DATA [--models 0.5B 1.5B 3B] [--precisions bf16 fp8] [--ours-only] [--profile]
                                            [--peers liger megatron megatron-eager megatron-fuser torchtitan]
DATA is what text_data.py wrote. Each run is a separate process, one after the other, on the same card. A step is all
of it: reading packs, forward, backward, clipping, optimizer. FLOPs are the model's (trainer/models/costs.py), MFU is
against the card's dense bfloat16 peak. A model is a size of Qwen2.5, or a whole name: Qwen3-1.7B. Peers:
- liger: Hugging Face with our packing, samples laid end to end, attention by FlashAttention's variable-length kernel,
  Liger's fused norm, rope, SwiGLU and linear cross entropy, torch's fused AdamW;
- megatron: stock megatron.core + Transformer Engine, see peers/megatron_core.py; -eager is without its CUDA graph,
  -fuser with Transformer Engine's operation fuser in the MLP, which its recipes leave off;
- torchtitan: see peers/torchtitan.py; of Qwen3 alone.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.side_by_side import Peer, main, train
from kanyun.cli.parser import Parser
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.models.config import ModelConfig
from trainer.models.registry import published_sizes

LENGTH = 8192
SIZES = published_sizes()
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def text_config(model_config: ModelConfig) -> dict[str, Any]:
    """config.json of a text model, as the hub has it."""
    model_type = model_config.model_type if model_config.model_type in ARCHITECTURES else "qwen2"
    own = {"head_dim": model_config.head_dim, "attention_bias": False} if model_type == "qwen3" else {}
    return own | {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
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
    model = SIZES[args.model if args.model in SIZES else f"Qwen2.5-{args.model}"]
    return TrainConfig(
        model=str(model_folder(text_config(model), args.data, folder / "hf")),
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


def liger(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import liger_kernel.transformers as kernels
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.peers.measure import measure

    config = config_of(args, folder)
    packed_attention()
    getattr(kernels, f"apply_liger_kernel_to_{ModelConfig.from_hf(config.model).model_type}")()
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config.model), attn_implementation="packed", dtype=torch.bfloat16
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step(batches: Sequence[Batch]) -> float:
        loss = torch.zeros(())
        for batch in batches:
            longest = int(batch.cu_seqlens.diff().max())
            batch = batch.to(torch.device("cuda"))
            labels = torch.where(batch.loss_mask > 0, batch.labels, -100)[None]
            loss = model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[:1],
                labels=labels,
                shift_labels=labels,
                cu_seqlens=batch.cu_seqlens,
                longest=longest,
                use_cache=False,
            ).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return measure(args, config, step)


def megatron(args: argparse.Namespace, folder: Path, **options: bool) -> dict[str, Any]:
    from benchmarks.peers.megatron_core import run

    return run(args, config_of(args, folder), **options)


def torchtitan(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.peers.torchtitan import run

    return run(args, config_of(args, folder))


BOTH = ("bf16", "fp8")
PEERS = {
    "liger": Peer("Hugging Face + Liger, packed", liger),
    "megatron": Peer("megatron.core + TE, whole-iteration graph", megatron, BOTH),
    "megatron-eager": Peer("megatron.core + TE, no graph", partial(megatron, graph=False), BOTH, usual=False),
    "megatron-fuser": Peer("megatron.core + TE, op fuser", partial(megatron, op_fuser=True), BOTH, usual=False),
    "torchtitan": Peer("torchtitan, compiled", torchtitan, BOTH, usual=False),
}

if __name__ == "__main__":
    about = Parser(description=__doc__, example="python benchmarks/train_text.py DATA --models 1.5B --ours-only")
    main(about, "model", ["0.5B", "1.5B", "3B"], ours, PEERS)
