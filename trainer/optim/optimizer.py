"""AdamW, sharded over the data-parallel ranks by megatron.core, and its learning rate."""

import math
from collections.abc import Sequence

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from trainer.config import TrainConfig
from trainer.optim.data_parallel import OverlappedDataParallel
from trainer.optim.shards import Shards
from trainer.optim.state import MOMENTS
from trainer.runtime import Runtime


def build_optimizer(config: TrainConfig, ddp: OverlappedDataParallel, runtime: Runtime) -> ChainedOptimizer:
    """Over the parameters that require a gradient. Master weights in float32, moments in the precision of the model."""
    moments = torch.bfloat16 if runtime.cuda else torch.float32
    settings = OptimizerConfig(
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        params_dtype=runtime.dtype,
        bf16=runtime.dtype == torch.bfloat16,
        use_distributed_optimizer=True,
        # A bfloat16 weight is the upper half of its float32 master weight: only the other 16 bits are stored beside it.
        use_precision_aware_optimizer=runtime.cuda,
        store_param_remainders=True,
        # Both moments in bfloat16, as DeepSeek-V3 was trained (arXiv 2412.19437, 3.3.3): 4 bytes a parameter less.
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
    )
    with ddp.optimized():
        optimizer: ChainedOptimizer = get_megatron_optimizer(settings, [ddp])
    for shards in ddp.sharded:
        if shards.trains:
            adam = optimizer.chained_optimizers[0].optimizer
            # Matrices decay. Of what megatron.core has, norms and biases, nothing may.
            adam.add_param_group({**adam.param_groups[0], "wd_mult": 1.0, "params": list(shards.weights)})
    # Adam makes its state in its first step. A checkpoint is loaded before that, and the first step may be skipped.
    for sharded in optimizer.chained_optimizers:
        for parameter in sharded.get_parameters():
            if runtime.cuda:
                sharded.optimizer.initialize_state(parameter, store_param_remainders=True)
            else:
                zeros = {name: torch.zeros_like(parameter) for name in MOMENTS}
                sharded.optimizer.state[parameter] = {"step": torch.zeros(()), **zeros}
    return optimizer


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of step 0 .. steps - 1: linear warmup, then cosine decay to min_lr.

    min_lr would be the rate of step `steps`, so that the last step still learns.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_rates(optimizer: ChainedOptimizer, config: TrainConfig, lr: float) -> None:
    """Set the learning rate and the weight decay of the next step.

    megatron.core puts biases and norms into a separate group (wd_mult 0), but leaves it to the learning-rate schedule
    to act on it: without this they would decay too.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = config.weight_decay * group["wd_mult"]


def take_step(optimizer: ChainedOptimizer, clip_grad: float, sharded: Sequence[Shards] = ()) -> float:
    """Clip the gradient and step. Returns its norm before clipping; if that is not finite, weights stay as they are."""
    optimizer.prepare_grads()
    (only,) = optimizer.chained_optimizers  # a second one would be of experts
    norm = float(only.clip_grad_norm(clip_grad))
    if math.isfinite(norm):
        optimizer.step_with_ready_grads()
        for shards in sharded:
            shards.publish()
    return norm
