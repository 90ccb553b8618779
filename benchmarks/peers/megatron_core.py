"""Stock megatron.core + Transformer Engine, as NVIDIA's recipes set it, on our packs: a peer of train_text.py.

GPTModel of `get_gpt_layer_with_transformer_engine_spec`, packs as THD (packed_seq_params, cu_seqlens of one size),
fused rope, SwiGLU, residuals and cross entropy, gradients added in place, fp8 by current scaling with weights cast once
a step (hybrid, "tensorwise", every layer: the performance recipes keep none in bfloat16), the distributed optimizer
with bfloat16 moments and 16-bit remainders, and megatron.core's own CUDA graph of the whole iteration. Nothing of
megatron.training. What its container has and a wheel has not: APEX's kernel for the head's gradient, here Transformer
Engine's matrix product. On a CPU: local layers, each pack as one segment, which shows that the parts fit, no more.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.measure import measure, our_micro_batch
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.models.config import ModelConfig

WARM_UP = 3  # steps: eager, then capture and replay, then one replay more
BATCH = dict[str, Any]


def apex() -> None:
    """Give megatron.core the function of APEX without which its output head cannot add its gradient in place."""
    from megatron.core.tensor_parallel import layers

    module = ModuleType("fused_weight_gradient_mlp_cuda")

    def accumulate(inputs: Tensor, gradient: Tensor, into: Tensor) -> None:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(inputs, gradient, out_dtype=into.dtype, layout="NT", out=into, accumulate=True, grad=True)

    module.wgrad_gemm_accum_fp32 = accumulate  # type: ignore[attr-defined]
    # megatron.core has looked for it when it was imported.
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = module, True


def core_config(model: ModelConfig, precision: str, graph: bool, op_fuser: bool) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    cuda = torch.cuda.is_available()
    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"} if precision == "fp8" else {}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        params_dtype=torch.bfloat16 if cuda else torch.float32,
        pipeline_dtype=torch.bfloat16 if cuda else torch.float32,
        bf16=cuda,
        gradient_accumulation_fusion=cuda,
        bias_activation_fusion=cuda,
        bias_dropout_fusion=cuda,
        masked_softmax_fusion=False,
        apply_rope_fusion=cuda,
        cross_entropy_loss_fusion=cuda,
        cross_entropy_fusion_impl="te" if cuda else "native",
        use_transformer_engine_op_fuser=op_fuser,
        cuda_graph_impl="full_iteration" if graph else "none",
        finalize_model_grads_func=finalize_model_grads,
        # FlashAttention is not in the kit; unfused attention in its place would be no peer.
        attention_backend=AttnBackend.fused if cuda else AttnBackend.auto,
        **fp8,
    )


def build(model: ModelConfig, core: Any) -> Any:
    """GPTModel in megatron.core's own DistributedDataParallel."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    if torch.cuda.is_available():
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=model.qk_norm, use_te_op_fuser=core.use_transformer_engine_op_fuser
        )
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization="RMSNorm")
    gpt = GPTModel(
        core,
        spec,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_positions,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
        share_embeddings_and_output_weights=model.tied,
    ).to(torch.cuda.current_device())
    # One rank has nobody to exchange gradients or weights with: no overlap to ask for.
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(core, settings, gpt)


def build_optimizer(wrapped: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    cuda = torch.cuda.is_available()
    moments = torch.bfloat16 if cuda else torch.float32
    settings = OptimizerConfig(
        lr=3e-4,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=cuda,
        params_dtype=torch.bfloat16 if cuda else torch.float32,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=cuda,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
    )
    return get_megatron_optimizer(settings, [wrapped])


def forward_step(batches: Iterator[BATCH], model: Any) -> tuple[Tensor, Any]:
    """megatron.core's forward_step_func: a micro-batch's loss of each token, and how to sum them up."""
    from megatron.core.packed_seq_params import PackedSeqParams

    batch = next(batches)
    packed = None
    if torch.cuda.is_available():
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch["cu_seqlens"],
            cu_seqlens_kv=batch["cu_seqlens"],
            max_seqlen_q=batch["longest"],
            max_seqlen_kv=batch["longest"],
        )
    losses = model(
        batch["input_ids"],
        batch["position_ids"],
        None if packed else batch["attention_mask"],
        labels=batch["labels"],
        packed_seq_params=packed,
    )
    return losses, partial(_sum, batch["loss_mask"])


def _sum(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, count = (losses.view(-1) * mask).sum(), mask.sum().to(torch.int)
    return total, count, {"sum": total.detach().clone(), "count": count}


def as_inputs(batch: Batch, length: int) -> BATCH:
    """A micro-batch of ours as forward_step reads it."""
    found: BATCH = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[:1],
        "labels": batch.labels[None],
        "loss_mask": batch.loss_mask,
        "cu_seqlens": batch.cu_seqlens,
        "longest": length,  # of a segment; the true one, which no static shape has, makes cuDNN no faster
    }
    if not torch.cuda.is_available():
        slots = len(batch.input_ids)
        found["attention_mask"] = torch.ones(slots, slots, dtype=torch.bool).triu(1)[None, None]
    return found


def train(args: argparse.Namespace, config: TrainConfig, graph: bool, op_fuser: bool) -> dict[str, Any]:
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper
    from megatron.core.pipeline_parallel import get_forward_backward_func

    micro_batch = args.micro_batch or our_micro_batch(args, config)
    model = ModelConfig.from_hf(config.model)
    wrapped = build(model, core_config(model, args.precision, graph, op_fuser))
    optimizer = build_optimizer(wrapped)
    forward_backward = get_forward_backward_func()
    if graph:
        forward_backward = FullCudaGraphWrapper(forward_backward, cuda_graph_warmup_steps=1, use_single_mempool=True)

    def step(batches: Sequence[Batch]) -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        results = forward_backward(
            forward_step_func=forward_step,
            data_iterator=(_to_device(as_inputs(batch, config.length), graph) for batch in batches),
            model=[wrapped],
            num_microbatches=len(batches),
            seq_length=config.length * micro_batch,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        return float(sum(each["sum"] for each in results) / sum(each["count"] for each in results))

    return measure(args, config, step, micro_batch=micro_batch, static=True, warm_up=WARM_UP)


def _to_device(batch: BATCH, graph: bool) -> BATCH:
    if graph:  # whose loader copies into its static buffers
        return batch
    return {k: v.cuda(non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def run(args: argparse.Namespace, config: TrainConfig, *, graph: bool = True, op_fuser: bool = False) -> dict[str, Any]:
    """Train with ours' micro-batch, or the next smaller one that fits."""
    if torch.cuda.is_available():
        apex()
    from megatron.core import parallel_state
    from megatron.core.full_cuda_graph import get_shared_capture_stream
    from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed

    from trainer.cpu_emulation import CpuAsCuda

    cuda = torch.cuda.is_available()
    with ExitStack() as stack:
        if not cuda:
            stack.enter_context(CpuAsCuda())
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        initialize_rng_tracker(use_te_rng_tracker=cuda, inference_rng_tracker=not cuda)
        model_parallel_cuda_manual_seed(0, te_rng_tracker=cuda, inference_rng_tracker=not cuda)
        if cuda:
            # The stream that megatron.core captures on: what the model was built on is what autograd uses.
            torch.cuda.set_stream(get_shared_capture_stream())
        try:
            result = train(args, config, graph and cuda, op_fuser)
        except torch.OutOfMemoryError:
            micro_batch = args.micro_batch or our_micro_batch(args, config)
            if micro_batch == 1:
                raise
            print(f"out of memory with {micro_batch} packs a micro-batch", file=sys.stderr, flush=True)
            again = [sys.executable, *sys.argv, "--micro-batch", str(micro_batch // 2)]
            os.execv(sys.executable, again)  # in a process anew: a failed capture leaves its memory behind
        _free_graph()  # NCCL never ends a communicator that a graph with its collectives still refers to
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        return result


def _free_graph() -> None:
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper

    graph = FullCudaGraphWrapper.cuda_graph["training"]
    if graph is not None:
        graph.reset()
