"""Decoder layers whose matrices are sharded over data-parallel ranks, and gathered for each layer's computation.

A layer's matrices lie one after the other in a *row*, which is cut into one equal part a rank. Two buffers of a whole
row take turns: while a layer computes with one, the next layer's parts are copied into the other, in both passes. A
layer's gradient is reduce-scattered as soon as it is complete, in bfloat16, and added to the part's in float32.

In fp8 the parts are cast once a step and gathered in 8 bits. Within a node the copy engines read them from the other
ranks' memory: a kernel of NCCL would wait for the multiprocessors that persistent matrix products hold, and be exposed
for 0.88 ms a layer of 7B where the copies are for 0.46 (docs/design.md). Parts do not change within a step, so such a
gather needs no synchronisation between ranks. Between nodes NCCL gathers. All of it is captured with a micro-batch's
passes in one CUDA graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor, nn

from trainer.optim.rows import e4m3_scales, fp8_parameter, is_in_main_grad, matrices_of, set_matrices
from trainer.optim.shards import ShardGroups, Shards, ranks_of_a_node


class ShardedLayers(Shards):
    """Shards the matrices of `layers`, which have equal shapes; vectors (norms, biases) stay whole.

    `fp8`: products are in fp8. A hook on `stack`, the layers' module, begins each forward pass. Call
    `sum_over_replicas` once a step, before the gradients are used, and `publish` after each change of the weights.
    """

    def __init__(
        self, stack: nn.Module, layers: nn.ModuleList, groups: ShardGroups, *, fp8: bool, device: torch.device
    ) -> None:
        self._fp8 = fp8
        # Within a node ranks read one another's memory.
        self._reads = device.type == "cuda" and dist.get_world_size(groups.group) <= ranks_of_a_node()
        self._peers: list[Tensor] = []  # of each rank, what it lets the others read
        owners = [list(matrices_of(layer)) for layer in layers]
        readable = partial(self._readable, groups.group, device)
        storage = readable if self._reads and not fp8 else None
        super().__init__(owners, groups, device=device, storage=storage)

        count, part, whole = len(layers), self.row.part, self.row.part * self.ranks
        zeros = partial(torch.zeros, dtype=torch.uint8 if fp8 else self._dtype, device=device)
        if fp8:
            # Between nodes a layer is cast when its turn comes to be gathered, which saves a byte a parameter.
            self._published = readable(count, part) if self._reads else zeros(2, part)
        self._rows = [zeros(whole) for _ in range(2)]
        kept = whole if self.trains else 0
        self._row_gradients = [torch.empty(kept, dtype=self._dtype, device=device) for _ in range(2)]
        self._received = torch.empty(part if self.trains else 0, dtype=self._dtype, device=device)
        # What each layer's matrices are multiplied by before their cast, and what an fp8 value is: cuBLAS wants each of
        # those aligned to 16 bytes. A captured graph reads both.
        self._casts = torch.ones(count, len(self.row.shapes), device=device)
        self._scales = torch.ones(count, len(self.row.shapes), 4, device=device)
        for layer in range(count):
            self._set_matrices(layer)

        self._copies, self._sums = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=-1)
        self._held: list[int | None] = [None, None]  # the layer whose weights a row has
        self._direction = 1
        self._whole: list[Any] = [None, None]  # events of this pass: the row is gathered
        self._summed: list[Any] = [None, None]  # its gradient is reduced
        self._left = [len(self.row.shapes)] * count  # gradients still to come
        stack.register_forward_pre_hook(lambda *_: self._begin())
        for number, module in enumerate(layers):
            module.register_forward_pre_hook(self._before_forward(number))
            module.register_forward_hook(self._after_forward(number))

    def row_name(self, row: int) -> str:
        return f"matrices of layer {row}"

    @torch.no_grad()
    def publish(self) -> None:
        if self._fp8:
            self._find_scales()
            for layer in range(len(self.weights)) if self._reads else ():
                self._cast(layer, self._published[layer])
        dist.all_reduce(torch.zeros(1, device=self.gradients.device), group=self.group)  # no rank reads before

    def _find_scales(self) -> None:
        """Let each matrix's largest value on any rank decide how it is cast."""
        largest = torch.zeros_like(self._casts)
        mine = [piece.matrix for piece in self._pieces]
        values = [weights[piece.begin : piece.end] for weights in self.weights for piece in self._pieces]
        norms = torch.stack(torch._foreach_norm(values, float("inf")))
        largest[:, mine] = norms.view(len(self.weights), -1).float()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        self._casts.copy_(e4m3_scales(largest))
        self._scales.copy_((1 / self._casts)[..., None])

    def _cast(self, layer: int, out: Tensor) -> None:
        """Cast this rank's part."""
        from trainer.kernels.cast import cast_to_e4m3

        for piece in self._pieces:
            span = slice(piece.begin, piece.end)
            cast_to_e4m3(self.weights[layer][span], self._casts[layer, piece.matrix], out[span])

    def _readable(self, group: dist.ProcessGroup, device: torch.device, count: int, part: int) -> Tensor:
        """Return zeros [count, part], in memory that every rank of a node can read: `_peers` has the others'."""
        dtype = torch.uint8 if self._fp8 else self._dtype
        mine = symmetric_memory.empty(count, part, dtype=dtype, device=device)
        handle = symmetric_memory.rendezvous(mine, group)
        self._peers = [handle.get_buffer(rank, mine.shape, dtype) for rank in range(dist.get_world_size(group))]
        return mine.zero_()

    def _set_matrices(self, layer: int) -> None:
        """Let the layer compute with the row that is its turn."""
        row, gradients, parameters = self._rows[layer % 2], self._row_gradients[layer % 2], []
        for matrix, (start, shape) in enumerate(zip(self.row.starts, self.row.shapes, strict=True)):
            old, span = self.parameters[layer][matrix], slice(start, start + shape.numel())
            values = row[span].view(shape)
            parameter = (
                fp8_parameter(values, self._scales[layer, matrix, :1], old)
                if self._fp8
                else nn.Parameter(values.data, requires_grad=self.trains)  # autograd does not count what is gathered
            )
            if self.trains:
                parameter.main_grad = gradients[span].view(shape)  # type: ignore[attr-defined]
                parameter.overwrite_main_grad = True  # type: ignore[attr-defined]
                parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
                parameter.register_post_accumulate_grad_hook(self._gradient_hook(layer))
            parameters.append(parameter)
        set_matrices(self._owners[layer], parameters)
        self.parameters[layer] = parameters

    def _begin(self) -> None:
        """Before a forward pass: nothing that was gathered before counts, since the weights may have changed."""
        self._held, self._whole, self._summed = [None, None], [None, None], [None, None]
        self._direction = 1
        for layer in range(min(2, len(self.weights))):
            self._gather(layer)

    def _before_forward(self, layer: int) -> Callable[..., None]:
        return lambda *_: self._use(layer)

    def _after_forward(self, layer: int) -> Callable[..., None]:
        """The gradient of a layer's output begins its backward pass."""

        def begin_backward(gradient: Tensor) -> None:
            self._direction = -1
            self._use(layer)

        def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
            if output[0].requires_grad:
                output[0].register_hook(begin_backward)

        return hook

    def _use(self, layer: int) -> None:
        """Let the current stream wait for a layer's weights, and begin to gather those of the next one."""
        turn, following = layer % 2, layer + self._direction
        if self._held[turn] != layer:
            self._gather(layer)
        self._whole[turn].wait()
        if self._direction < 0 and self._summed[turn] is not None:
            self._summed[turn].wait()  # this layer's gradients take their place
        if 0 <= following < len(self.weights) and self._held[following % 2] != following:
            self._gather(following)

    def _gather(self, layer: int) -> None:
        row, turn = self._rows[layer % 2], layer % 2
        self._copies.wait_stream(torch.cuda.current_stream())  # on which the layer before has finished with the row
        with torch.no_grad(), torch.cuda.stream(self._copies):
            if self._reads:
                parts = row.view(self.ranks, -1)
                for rank in (*range(self.rank, self.ranks), *range(self.rank)):  # not all from one
                    parts[rank].copy_(self._peers[rank][layer], non_blocking=True)
            else:
                mine = self._published[turn] if self._fp8 else self.weights[layer].detach()
                if self._fp8:
                    self._cast(layer, mine)
                dist.all_gather_into_tensor(row, mine, group=self._gathers)
            self._whole[turn] = torch.cuda.Event()
            self._whole[turn].record()
        if self._fp8:
            # Transformer Engine keeps what it transposed for a backward pass.
            for stale in (layer, self._held[turn]):
                for parameter in () if stale is None else self.parameters[stale]:
                    parameter._transpose, parameter._transpose_invalid = None, True  # type: ignore[attr-defined]
        self._held[turn] = layer

    def _gradient_hook(self, layer: int) -> Callable[[Tensor], None]:
        def hook(parameter: Any) -> None:
            if not is_in_main_grad(parameter):
                parameter.main_grad.copy_(parameter.grad)
            parameter.grad, parameter.grad_added_to_main_grad = None, False
            self._left[layer] -= 1
            if self._left[layer] == 0:
                self._left[layer] = len(self.row.shapes)
                self._reduce(layer)

        return hook

    def _reduce(self, layer: int) -> None:
        current, turn = torch.cuda.current_stream(), layer % 2
        self._sums.wait_stream(current)
        with torch.no_grad(), torch.cuda.stream(self._sums):
            dist.reduce_scatter_tensor(self._received, self._row_gradients[turn], group=self.group)
            self.gradients[layer].add_(self._received)
            self._summed[turn] = torch.cuda.Event()
            self._summed[turn].record()
        if layer == 0:  # the last one of a backward pass
            current.wait_stream(self._sums)
