"""Data parallelism whose exchange runs beside the matrix products, under one CUDA graph for every micro-batch.

megatron.core's DistributedDataParallel keeps gradients and weights in buckets, each rank an equal part of a bucket's
optimizer state. Here the exchange of a bucket is ordered by two external CUDA events, which a captured graph records
and waits for at each replay:

- *ready*, recorded where the backward pass has finished the bucket's last gradient. After the step's last micro-batch
  a second stream waits for it and reduce-scatters the bucket, while the backward pass goes on with the layers below.
- *whole*, recorded after the all-gather of the bucket's new weights. The layers that need them wait for it, while the
  forward pass of the layers above goes on.

No collective is captured, so first, middle and last micro-batches replay the same graph; in the middle ones every event
has long happened. Graphs with the collectives inside would be three of each shape bucket.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Bucket  # a group has one bucket
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from trainer.models.language import LanguageModel
from trainer.optim.fp8_weights import Fp8Weights

# Parameters of a bucket, and of a rank's part of one, as megatron.core has them: smaller ones cost latency.
BUCKET, PART = 40_000_000, 1_000_000
LEAST_BUCKETS = 8  # the exchange of the last one has no backward pass beside it


class OverlappedDataParallel(DistributedDataParallel):
    """Gradients in float32, summed over the data-parallel ranks by `finish_grad_sync`.

    Between the optimizer's step and the next forward pass weights are still under way: whoever reads them elsewhere
    calls `wait_for_weights` first. Must be made and called on the stream that captures.

    What the model has sharded exchanges its own gradients, see Shards; the rest is here.
    `transposed_weights`: see Fp8Weights, which whole weights are kept in where products are in fp8.
    """

    def __init__(
        self,
        config: TransformerConfig,
        module: LanguageModel,
        *,
        transposed_weights: bool = False,
    ) -> None:
        self.sharded = module.sharded
        # Not megatron.core's own overlap: its hooks want a gradient tensor of every parameter, and ours go straight
        # into main_grad; and its collectives would have to be captured.
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        ranks = parallel_state.get_data_parallel_world_size()
        with self._shards_hidden():
            trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
            size = min(max(BUCKET, ranks * PART), sum(p.numel() for p in trainable) // LEAST_BUCKETS)
            layout = DistributedOptimizer.compute_full_param_layout(trainable, size, ranks, settings)
            super().__init__(config, settings, module, full_param_layout=layout)

        self._exchange = torch.cuda.Stream(priority=-1)  # its kernels get multiprocessors first, as they free up
        self._ready = {bucket: _event() for bucket in self.bucket_groups}
        self._whole = {bucket: _event() for bucket in self.bucket_groups}
        self._left = Counter({bucket: len(bucket.params) for bucket in self.bucket_groups})  # gradients of this pass
        # In the order of the first pass: the same on every rank, since each runs the same model.
        self._reduce_order: list[Bucket] = []
        self._gather_order: list[Bucket] = []
        for parameter, node in zip(trainable, self.grad_accs, strict=True):
            node.register_hook(self._gradient_hook(self.param_to_bucket_group[parameter]))
        for user, parameters in users(module):
            buckets = [self.param_to_bucket_group[p] for p in parameters if p in self.param_to_bucket_group]
            user.register_forward_pre_hook(self._weights_hook(list(dict.fromkeys(buckets))))
        self._fp8: Fp8Weights | None = None
        # Under tensor parallelism parameters carry marks of megatron.core's that copies would lack.
        if config.fp8 is not None and not self.sharded and config.tensor_model_parallel_size == 1:
            layers = [layer for child in module.children() for stack in _stacks(child) for layer in stack]
            self._fp8 = Fp8Weights(layers, self._gradient_hook_of, transposes=transposed_weights)
        module.fp8_weights = self._fp8

    @contextmanager
    def optimized(self) -> Iterator[None]:
        """Let the model have the parameters that megatron.core's optimizer is to have, for the block."""
        with self._shards_hidden(), self._fp8.masters() if self._fp8 else nullcontext():
            yield

    @contextmanager
    def _shards_hidden(self) -> Iterator[None]:
        with ExitStack() as stack:
            for shards in self.sharded:
                stack.enter_context(shards.hidden())
            yield

    def zero_grad_buffer(self) -> None:
        super().zero_grad_buffer()
        for shards in self.sharded:
            shards.gradients.zero_()

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        super().scale_gradients(scaling_factor)
        for shards in self.sharded:
            shards.gradients.mul_(scaling_factor)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Reduce-scatter every bucket once; the current stream waits for the sums. Called once a step."""
        assert len(self._reduce_order) == len(self.bucket_groups), "a parameter that trains got no gradient"
        with torch.cuda.stream(self._exchange):
            for bucket in self._reduce_order:
                self._ready[bucket].wait()
                bucket.start_grad_sync()
        for shards in self.sharded:
            shards.sum_over_replicas()
        torch.cuda.current_stream().wait_stream(self._exchange)
        # The optimizer gathers weights in the order of this list.
        self.bucket_groups.sort(key=self._gather_order.index)

    def _start_bucket_group_param_sync(self, bucket_group: Bucket, force_sync: bool) -> None:
        """Gather a bucket's new weights, and cast them; the optimizer calls it for each in turn, after its step."""
        self._exchange.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._exchange):
            super()._start_bucket_group_param_sync(bucket_group, force_sync)
            if self._fp8:
                self._fp8.cast(bucket_group.params)
            self._whole[bucket_group].record()

    def wait_for_weights(self) -> None:
        """Block until every bucket's weights are whole."""
        self._exchange.synchronize()

    def _gradient_hook(self, bucket: Bucket) -> Callable[..., None]:
        """After megatron.core's own hook, which has added the gradient to main_grad."""

        def hook(*gradients: Any) -> None:
            self._left[bucket] -= 1
            if self._left[bucket] == 0:
                self._left[bucket] = len(bucket.params)
                self._ready[bucket].record()
                if bucket not in self._reduce_order:
                    self._reduce_order.append(bucket)

        return hook

    def _gradient_hook_of(self, parameter: nn.Parameter) -> Callable[..., None]:
        return self._gradient_hook(self.param_to_bucket_group[parameter])

    def _weights_hook(self, buckets: list[Bucket]) -> Callable[..., None]:
        def hook(*inputs: Any) -> None:
            for bucket in buckets:
                self._whole[bucket].wait()
                if bucket not in self._gather_order:
                    self._gather_order.append(bucket)

        return hook


def users(model: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules that wait for weights, and for which: every layer of a stack for its own, and the last one also for what
    follows the stack (final norm, output head); the model for what comes before (embeddings). A fused operation calls
    no module, so single modules cannot wait. A child defines its modules in the order of their use.
    """
    before: list[nn.Parameter] = []
    pairs = [(model, before)]
    for child in model.children():
        layers = {layer: list(layer.parameters()) for stack in _stacks(child) for layer in stack}
        owner = {parameter: layer for layer, parameters in layers.items() for parameter in parameters}
        waits = before
        for parameter in child.parameters():
            if parameter in owner:
                waits = layers[owner[parameter]]
            else:
                waits.append(parameter)
        pairs += layers.items()
    return pairs


def _stacks(module: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of modules."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [stack for child in module.children() for stack in _stacks(child)]


def _event() -> torch.cuda.Event:
    """A capture records or waits for it anew at each replay, instead of making it an edge of the graph."""
    event = torch.cuda.Event(external=True)
    event.record()  # an event is created when it is first recorded, which a capture cannot do
    return event
