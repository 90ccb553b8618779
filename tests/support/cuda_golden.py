"""For tests on a GPU: a model as the trainer wraps it, and CUDA graphs beside the same step without one."""

from collections.abc import Callable

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from trainer.data.batch import Batch
from trainer.graph import Graphed
from trainer.models.language import LanguageModel
from trainer.runtime import Runtime


def losses_of_graphs(model: LanguageModel, batches: list[Batch], runtime: Runtime) -> list[float]:
    """Warmed up on the first batch; each batch's loss and gradients must be those without a graph."""
    ddp, total = in_ddp(model), torch.zeros((), device=runtime.device)

    def work(batch: Batch) -> None:
        loss = ddp(batch)
        loss.backward()
        total.add_(loss.detach())

    def run(step: Callable[[Batch], None], batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        total.zero_()
        ddp.zero_grad_buffer()
        step(batch)
        return total.item(), {name: p.main_grad.clone() for name, p in model.named_parameters()}

    graph = Graphed(work, runtime.device)
    graph.prepare(batches[0], max(0 if b.vision is None else len(b.vision.patches) for b in batches))
    losses = []
    for batch in batches:
        loss, gradients = run(graph, batch)
        expected, exact = run(work, batch.to(runtime.device))
        assert loss == pytest.approx(expected, rel=1e-3)
        for name, gradient in exact.items():
            assert (gradients[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-6, name
        losses.append(loss)
    return losses


def in_ddp(model: LanguageModel) -> DistributedDataParallel:
    """Wrap the model as Trainer does: gradients are added up in main_grad, by the matrix products themselves."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(model.config, config, model)
    from trainer.models.layers_te import accumulate_in_place

    accumulate_in_place(model)
    return ddp
