"""torchtitan's Qwen3 on our packs: a peer of train_text.py for Qwen3-0.6B, 1.7B and so on.

Its parts put together as its trainer does: its model with its "varlen" attention told where samples end, its conversion
of linears to float8 (torchao, scaled tensor by tensor, all but the head), its torch.compile of each block and of the
loss, its gradient clipping, torch's fused AdamW. Weights, gradients and moments are bfloat16, 8 bytes a parameter: on
one GPU its usual float32 ones with casts would be slower. Where the activations of a pack do not fit, its selective
activation checkpointing. Written for 0.2.2: 0.3.0 needs a newer torch (torch.distributed.fsdp.DataParallelMeshDims).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.measure import measure
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.models.config import ModelConfig

WARM_UP = 3  # steps: compiled for the first pack's longest sample, then for any
HEAD = "output"


def build(model: ModelConfig, length: int, precision: str, selective: bool) -> Any:
    from torchtitan.components.quantization.utils import module_filter_fn
    from torchtitan.config.job_config import ActivationCheckpoint, Compile
    from torchtitan.distributed.activation_checkpoint import apply_ac
    from torchtitan.models.llama4.infra.parallelize import apply_compile
    from torchtitan.models.qwen3.infra.parallelize import _op_sac_save_list
    from torchtitan.models.qwen3.model.args import Qwen3ModelArgs
    from torchtitan.models.qwen3.model.model import Qwen3Model

    cuda = torch.cuda.is_available()
    args = Qwen3ModelArgs(
        dim=model.hidden_size,
        n_layers=model.num_layers,
        n_heads=model.num_heads,
        n_kv_heads=model.num_kv_heads,
        vocab_size=model.vocab_size,
        head_dim=model.head_dim,
        hidden_dim=model.intermediate_size,
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        max_seq_len=length,
        attn_type="varlen" if cuda else "sdpa",
        attn_mask_type="block_causal" if cuda else "causal",
        enable_weight_tying=model.tied,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        found: Any = Qwen3Model(args)
    torch.set_default_dtype(before)
    if precision == "fp8":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        rule = partial(module_filter_fn, filter_fqns=[HEAD])
        convert_to_float8_training(found, config=Float8LinearConfig(emulate=not cuda), module_filter_fn=rule)
    if selective:
        apply_ac(
            found,
            ActivationCheckpoint(mode="selective", selective_ac_option="op"),
            model_compile_enabled=True,
            op_sac_save_list=_op_sac_save_list,
        )
    if cuda:
        apply_compile(found, Compile(enable=True), ep_enabled=False)
    device = "cuda" if cuda else "cpu"
    found.to_empty(device=device)
    with torch.no_grad():
        found.init_weights(buffer_device=torch.device(device))
    return found.train()


def train(args: argparse.Namespace, config: TrainConfig, selective: bool) -> dict[str, Any]:
    from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss
    from torchtitan.models.attention import VarlenMetadata

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model = build(ModelConfig.from_hf(config.model), config.length, args.precision, selective)
    loss_of = torch.compile(cross_entropy_loss) if cuda else cross_entropy_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batches: Sequence[Batch]) -> float:
        total: Tensor | float = 0.0
        trained = sum(int(batch.loss_mask.sum()) for batch in batches)
        for batch in batches:
            longest = int(batch.cu_seqlens.diff().max())
            batch = batch.to(device)
            ends = batch.cu_seqlens
            masks = VarlenMetadata(cu_seq_q=ends, cu_seq_k=ends, max_q=longest, max_k=longest) if cuda else None
            labels = torch.where(batch.loss_mask > 0, batch.labels, IGNORE_INDEX)[None]
            loss = loss_of(model(batch.input_ids[None], attention_masks=masks), labels) / trained
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return measure(args, config, step, static=True, warm_up=WARM_UP)


def run(args: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """Raises ValueError for another model than a Qwen3."""
    family = ModelConfig.from_hf(config.model).model_type
    if family != "qwen3":
        raise ValueError(f"torchtitan has no {family}: choose --models Qwen3-1.7B")
    selective = bool(os.environ.get("TITAN_SELECTIVE"))
    try:
        return train(args, config, selective)
    except torch.OutOfMemoryError:
        if selective:
            raise
        print("out of memory: once more with selective activation checkpointing", file=sys.stderr, flush=True)
        os.environ["TITAN_SELECTIVE"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
