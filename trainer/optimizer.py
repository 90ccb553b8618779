"""AdamW, sharded over the data-parallel ranks by megatron.core, and its learning rate."""

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from trainer.config import TrainConfig
from trainer.runtime import Runtime


def build_optimizer(config: TrainConfig, ddp: DistributedDataParallel, runtime: Runtime) -> ChainedOptimizer:
    """Over the parameters that require a gradient; master weights and moments in float32."""
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
    )
    optimizer: ChainedOptimizer = get_megatron_optimizer(settings, [ddp])
    if runtime.cuda:
        for sharded in optimizer.chained_optimizers:
            sharded.__class__ = _WholeMasterWeights  # megatron.core chooses the class itself
            for parameter in sharded.get_parameters():
                # megatron.core 0.19.2 would do it when loading, with too few arguments for Transformer Engine 2.20.
                sharded.optimizer.initialize_state(parameter, store_param_remainders=True)
    else:
        # torch's AdamW makes its state in its first step. megatron.core cannot save or load it before that, and the
        # first step is after loading, and may be skipped.
        for parameter in optimizer.get_parameters():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    return optimizer


class _WholeMasterWeights(DistributedOptimizer):
    """Checkpoints hold float32 master weights, whatever the device: joined when saved, and split when loaded.

    With megatron.core 0.19.2's own methods a checkpoint would hold the remainders in their place.
    """

    def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = super()._get_main_param_and_optimizer_states(model_param)
        # On the CPU, where they go anyway: a GPU that trains has no room for copies.
        return {**tensors, "param": joined(self._shard(model_param).cpu(), tensors["param"].cpu())}

    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        weight, remainder = split(tensors["param"].cpu())
        self._shard(model_param).copy_(weight)
        super()._set_main_param_and_optimizer_states(model_param, {**tensors, "param": remainder})

    def _shard(self, model_param: Tensor) -> Tensor:
        """This rank's part of a weight, which the optimizer steps on."""
        group, index = self.model_param_group_index_map[model_param]
        shard: Tensor = self.optimizer.param_groups[group]["params"][index]
        return shard.detach()


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> the nearest bfloat16 weight, and int16 what it lacks: as integers of the bits, the sum is the master.

    Transformer Engine's FusedAdam has them so (store_param_remainders).
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split`."""
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Of step 0 .. steps - 1: rises in a line during the warm-up, then falls from lr along half a cosine to min_lr,
    which would be that of step `steps`: the last one still learns.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_rates(optimizer: ChainedOptimizer, config: TrainConfig, lr: float) -> None:
    """For the next step. megatron.core puts biases and norms into a group of their own (wd_mult 0), but leaves it to
    the learning-rate schedule to act on it: without this they would decay too.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = config.weight_decay * group["wd_mult"]


def take_step(optimizer: ChainedOptimizer, clip_grad: float) -> float:
    """Clip the gradient and step. Returns its norm before clipping; if that is not finite, weights stay as they are."""
    optimizer.prepare_grads()
    (only,) = optimizer.chained_optimizers  # a second one would be of experts
    norm = float(only.clip_grad_norm(clip_grad))
    if math.isfinite(norm):
        optimizer.step_with_ready_grads()
    return norm
