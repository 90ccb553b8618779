"""Decoder layers whose weights, gradients and optimizer state are sharded over the data-parallel ranks.

A layer's matrices lie one after the other in a *row*, which is cut into one equal part a rank. Of its parts a rank
keeps weights, float32 gradients and the optimizer's state: 12 bytes a parameter, divided by the ranks. Two buffers of a
whole row take turns: while a layer computes with one, the next layer's parts are copied into the other, in both passes.
A layer's gradient is reduce-scattered as soon as it is complete, in bfloat16, and added to the part's in float32.

In fp8 the parts are cast once a step and gathered in 8 bits. Within a node the copy engines read them from the other
ranks' memory: a kernel of NCCL would wait for the multiprocessors that persistent matrix products hold, and be exposed
for 0.88 ms a layer of 7B where the copies are for 0.46 (docs/design.md). Parts do not change within a step, so such a
gather needs no synchronisation between ranks. Between nodes NCCL gathers. All of it is captured with a micro-batch's
passes in one CUDA graph.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.optim.rows import Row, e4m3_scales, fp8_parameter, matrices_of, set_matrices
from trainer.optim.state import Place, rectangles


class ShardedLayers:
    """Shards the matrices of `layers`, which have equal shapes; vectors (norms, biases) stay whole.

    `group`: the ranks that share the layers; `gathers`: the same, for what runs beside; `replicas`: the ranks that have
    the same part. `fp8`: products are in fp8.
    Takes the layers' weights as they are; a hook on `stack`, the layers' module, begins each forward pass. Call
    `sum_over_replicas` once a step, before the gradients are used, and `publish` after each change of the weights.
    """

    def __init__(
        self,
        stack: nn.Module,
        layers: nn.ModuleList,
        *,
        group: dist.ProcessGroup,
        gathers: dist.ProcessGroup,
        replicas: dist.ProcessGroup,
        fp8: bool,
    ) -> None:
        self._group, self._rank, self._ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self._gathers, self._replicas, self._replica = gathers, replicas, dist.get_rank(replicas)
        self._owners = [list(matrices_of(layer)) for layer in layers]  # of each layer: module, name of the parameter
        first = [module.get_parameter(name) for module, name in self._owners[0]]
        self._row = Row([parameter.shape for parameter in first], self._ranks)
        self._pieces = list(self._row.pieces(self._rank))
        self.trains = first[0].requires_grad

        device, dtype = first[0].device, first[0].dtype
        count, whole = len(layers), self._row.part * self._ranks
        self._fp8 = fp8
        self._published, self._peers = self._shared(count, torch.uint8 if fp8 else dtype, device)
        values = torch.zeros(count, self._row.part, dtype=dtype, device=device) if fp8 else self._published
        self.weights = [nn.Parameter(part, requires_grad=self.trains) for part in values]
        self.gradients = torch.zeros(count, self._row.part if self.trains else 0, device=device)
        self._rows = [torch.zeros(whole, dtype=self._published.dtype, device=device) for _ in range(2)]
        kept = whole if self.trains else 0
        self._row_gradients = [torch.empty(kept, dtype=dtype, device=device) for _ in range(2)]
        self._received = torch.empty(self._row.part if self.trains else 0, dtype=dtype, device=device)
        # What an fp8 value of each layer's matrices is multiplied by. cuBLAS wants each aligned to 16 bytes.
        self._scales = torch.ones(count, len(self._row.shapes), 4, device=device)
        self.parameters: list[list[nn.Parameter]] = []
        self.places: list[list[Place]] = []  # of the matrices in a checkpoint, once asked for
        for layer in range(count):
            self._take(layer)
        for weights, gradients in zip(self.weights, self.gradients, strict=True):
            # Where Transformer Engine's Adam, and torch's, look for it.
            weights.decoupled_grad = gradients  # type: ignore[attr-defined]
            weights.shared = self._replica > 0  # type: ignore[attr-defined]  # counts once in the gradient's norm
            if self.trains and weights.dtype == torch.float32:
                weights.grad = gradients

        self._copies, self._sums = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=-1)
        self._held: list[int | None] = [None, None]  # the layer whose weights a row has
        self._direction = 1
        self._whole: list[Any] = [None, None]  # events of this pass: the row is gathered
        self._summed: list[Any] = [None, None]  # its gradient is reduced
        self._left = [len(self._row.shapes)] * count  # gradients still to come
        stack.register_forward_pre_hook(lambda *_: self._begin())
        for number, module in enumerate(layers):
            module.register_forward_pre_hook(self._before_forward(number))
            module.register_forward_hook(self._after_forward(number))
        self.publish()

    def sum_over_replicas(self) -> None:
        if dist.get_world_size(self._replicas) > 1:
            dist.all_reduce(self.gradients, group=self._replicas)

    @torch.no_grad()
    def publish(self) -> None:
        """Make weights that changed readable for every rank. Every rank calls it, after all have finished reading."""
        if self._fp8:
            self._cast()
        dist.all_reduce(torch.zeros(1, device=self._published.device), group=self._group)  # no rank reads before

    def _cast(self) -> None:
        """Cast this rank's parts, each matrix with the scale of its largest value on any rank."""
        from trainer.kernels.cast import cast_to_e4m3

        largest = torch.zeros_like(self._scales[..., 0])
        mine = [piece.matrix for piece in self._pieces]
        values = [weights[piece.begin : piece.end] for weights in self.weights for piece in self._pieces]
        norms = torch.stack(torch._foreach_norm(values, float("inf")))
        largest[:, mine] = norms.view(len(self.weights), -1).float()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        scales = e4m3_scales(largest)
        self._scales.copy_((1 / scales)[..., None])
        for layer, weights in enumerate(self.weights):
            for piece in self._pieces:
                span = slice(piece.begin, piece.end)
                cast_to_e4m3(weights[span], scales[layer, piece.matrix], self._published[layer, span])

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Let the matrices look frozen for the block: megatron.core takes all parameters that train."""
        matrices = [parameter for layer in self.parameters for parameter in layer]
        for parameter in matrices:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in matrices:
                parameter.requires_grad_(self.trains)

    @contextmanager
    def placeholders(self) -> Iterator[list[list[nn.Parameter]]]:
        """Put matrices of the whole shape and no memory into the layers, for what only asks for shapes."""
        dtype = self.weights[0].dtype
        empty = [
            [nn.Parameter(torch.empty(s, dtype=dtype, device="meta")) for s in self._row.shapes] for _ in self.weights
        ]
        for owners, parameters in zip(self._owners, empty, strict=True):
            set_matrices(owners, parameters)
        try:
            yield empty
        finally:
            for owners, parameters in zip(self._owners, self.parameters, strict=True):
                set_matrices(owners, parameters)

    def in_checkpoint(self, state: dict[str, Any], matrices: list[list[nn.Parameter]]) -> dict[str, Any]:
        """Return the model's state with rectangles of this rank's parts in place of `matrices`, its placeholders."""
        names = {id(entry.data): name for name, entry in state.items()}
        whole = [[names[id(parameter)] for parameter in layer] for layer in matrices]
        self.places = [[state[name] for name in layer] for layer in whole]
        saved = {name: entry for name, entry in state.items() if name not in {n for layer in whole for n in layer}}
        for layer, weights in enumerate(self.weights):
            for piece in self._pieces:
                values = weights.detach()[piece.begin : piece.end]
                place = self.places[layer][piece.matrix]
                for number, part in enumerate(rectangles(place, piece.first, values, self._replica)):
                    saved[f"{whole[layer][piece.matrix]} {number}"] = part
        return saved

    @property
    def replica(self) -> int:
        return self._replica

    def shards(self) -> Iterator[tuple[Tensor, list[tuple[Place, int, slice]]]]:
        """For OptimizerState. Only after `in_checkpoint`."""
        for weights, places in zip(self.weights, self.places, strict=True) if self.trains else ():
            yield weights, [(places[p.matrix], p.first, slice(p.begin, p.end)) for p in self._pieces]

    def named_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's part of each layer's matrices, with a name for people."""
        for layer, weights in enumerate(self.weights):
            yield f"matrices of layer {layer}, part {self._rank + 1} of {self._ranks}", weights

    def _shared(self, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor] | None]:
        """Return memory for this rank's parts, and the same of every rank, where they can be read."""
        if device.type != "cuda" or self._ranks > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
            return torch.zeros(count, self._row.part, dtype=dtype, device=device), None
        import torch.distributed._symmetric_memory as symmetric_memory

        mine = symmetric_memory.empty(count, self._row.part, dtype=dtype, device=device)
        handle = symmetric_memory.rendezvous(mine, self._group)
        return mine.zero_(), [handle.get_buffer(rank, mine.shape, dtype) for rank in range(self._ranks)]

    @torch.no_grad()
    def _take(self, layer: int) -> None:
        """Keep this rank's part of the layer's matrices, and let the layer compute with the row that is its turn."""
        parameters = []
        for piece in self._pieces:
            module, name = self._owners[layer][piece.matrix]
            values = module.get_parameter(name).reshape(-1)[piece.first : piece.first + piece.end - piece.begin]
            self.weights[layer][piece.begin : piece.end].copy_(values)
        row, gradients = self._rows[layer % 2], self._row_gradients[layer % 2]
        for matrix, (start, shape) in enumerate(zip(self._row.starts, self._row.shapes, strict=True)):
            module, name = self._owners[layer][matrix]
            old, span = module.get_parameter(name), slice(start, start + shape.numel())
            if self._fp8:
                parameter = fp8_parameter(row[span].view(shape), self._scales[layer, matrix, :1], old)
            else:
                parameter, old.data = old, row[span].view(shape)
            if self.trains:
                parameter.main_grad = gradients[span].view(shape)  # type: ignore[attr-defined]
                parameter.overwrite_main_grad = True  # type: ignore[attr-defined]
                parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
                parameter.register_post_accumulate_grad_hook(self._gradient_hook(layer))
            parameters.append(parameter)
        set_matrices(self._owners[layer], parameters)
        self.parameters.append(parameters)

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
            if self._peers is None:
                dist.all_gather_into_tensor(row, self._published[layer], group=self._gathers)
            else:
                parts = row.view(self._ranks, -1)
                for rank in (
                    *range(self._rank, self._ranks),
                    *range(self._rank),
                ):  # not all from one
                    parts[rank].copy_(self._peers[rank][layer], non_blocking=True)
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
            # Transformer Engine's products have written main_grad themselves, and hand over a dummy or an alias of it.
            written = parameter.grad_added_to_main_grad or parameter.grad.data_ptr() == parameter.main_grad.data_ptr()
            if not written:
                parameter.main_grad.copy_(parameter.grad)
            parameter.grad, parameter.grad_added_to_main_grad = None, False
            self._left[layer] -= 1
            if self._left[layer] == 0:
                self._left[layer] = len(self._row.shapes)
                self._reduce(layer)

        return hook

    def _reduce(self, layer: int) -> None:
        current, turn = torch.cuda.current_stream(), layer % 2
        self._sums.wait_stream(current)
        with torch.no_grad(), torch.cuda.stream(self._sums):
            dist.reduce_scatter_tensor(self._received, self._row_gradients[turn], group=self._group)
            self.gradients[layer].add_(self._received)
            self._summed[turn] = torch.cuda.Event()
            self._summed[turn].record()
        if layer == 0:  # the last one of a backward pass
            current.wait_stream(self._sums)
