"""Matrices that data-parallel ranks share: a rank keeps an equal part of weights, gradients and optimizer state.

That is 12 bytes a parameter, divided by the ranks. How a model computes with matrices of which a rank has a part is the
subclasses' matter: decoder layers gather them (sharded_layers.py), the vocabulary exchanges activations instead
(sharded_vocabulary.py).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from trainer.optim.rows import ALIGNED, Row, set_matrices
from trainer.optim.state import Place, rectangles

type Owner = tuple[nn.Module, str]  # of a matrix: the module, and the name of its parameter


class ShardGroups(NamedTuple):
    """Process groups of one rank."""

    group: dist.ProcessGroup  # the ranks that share matrices
    gathers: dist.ProcessGroup  # the same ranks, for gathers that run beside other collectives
    replicas: dist.ProcessGroup  # the ranks that have the same parts

    @classmethod
    def of(cls, count: int) -> Self:
        """Return those of `count` neighbouring ranks that share matrices. Every rank calls it."""
        # Separate communicators: their collectives are captured, and run beside those of the buckets.
        ranks = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
        blocks = [ranks[first : first + count] for first in range(0, len(ranks), count)]
        group, _ = dist.new_subgroups_by_enumeration(blocks)
        gathers, _ = dist.new_subgroups_by_enumeration(blocks)
        replicas, _ = dist.new_subgroups_by_enumeration([ranks[first::count] for first in range(count)])
        return cls(group, gathers, replicas)


def ranks_of_a_node() -> int:
    """Return how many ranks of the job this node has; on every node as many."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def matrices_without_memory() -> Iterator[None]:
    """Let every matrix that a module registers be on the meta device: a whole model may fit no GPU."""

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.dim() != 2:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation says that it returns nothing; what it returns is registered.
    hook = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class Shards:
    """Rows of matrices, each row cut into one part a rank.

    `owners`: of each row, its matrices, of the same shapes in every row and without memory: weights are 0 until `take`.
    `alignment`: elements that a part is a multiple of. `storage`: returns zeros of a shape for the weights.
    """

    def __init__(
        self,
        owners: Sequence[list[Owner]],
        groups: ShardGroups,
        *,
        device: torch.device,
        alignment: int = ALIGNED,
        storage: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        self.group, self._gathers, self._replicas = groups
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.replica = dist.get_rank(self._replicas)
        self._owners = owners
        self.parameters = [[module.get_parameter(name) for module, name in row] for row in owners]  # of the modules
        first, count = self.parameters[0], len(owners)
        self.row = Row([parameter.shape for parameter in first], self.ranks, alignment)
        self._pieces = list(self.row.pieces(self.rank))
        self.trains, self._dtype = first[0].requires_grad, first[0].dtype
        self.places: list[list[Place]] = []  # of the matrices in a checkpoint, once asked for
        zeros = storage or (lambda *shape: torch.zeros(shape, dtype=self._dtype, device=device))
        self.weights = [nn.Parameter(part, requires_grad=self.trains) for part in zeros(count, self.row.part)]
        self.gradients = torch.zeros(count, self.row.part if self.trains else 0, device=device)
        for weights, gradients in zip(self.weights, self.gradients, strict=True):
            # Where Transformer Engine's Adam, and torch's, look for it.
            weights.decoupled_grad = gradients  # type: ignore[attr-defined]
            weights.shared = self.replica > 0  # type: ignore[attr-defined]  # counts once in the gradient's norm
            if self.trains and weights.dtype == torch.float32:
                weights.grad = gradients

    def row_name(self, row: int) -> str:
        """Return what people call a row."""
        raise NotImplementedError

    def publish(self) -> None:
        """Let every rank compute with weights that changed. Every rank calls it, after all have finished computing."""

    def sum_over_replicas(self) -> None:
        """Complete the gradients, once a step."""
        if dist.get_world_size(self._replicas) > 1:
            dist.all_reduce(self.gradients, group=self._replicas)

    @torch.no_grad()
    def take(self, row: int, matrix: int, values: Tensor) -> None:
        """Keep this rank's part of a matrix with these values."""
        for piece in self._pieces:
            if piece.matrix == matrix:
                part = values.reshape(-1)[piece.first : piece.first + piece.end - piece.begin]
                self.weights[row][piece.begin : piece.end].copy_(part)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Let the matrices look frozen for the block: megatron.core takes all parameters that train."""
        matrices = [parameter for row in self.parameters for parameter in row]
        for parameter in matrices:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in matrices:
                parameter.requires_grad_(self.trains)

    @contextmanager
    def placeholders(self) -> Iterator[list[list[nn.Parameter]]]:
        """Put matrices of the whole shape and no memory into the modules, for what only asks for shapes."""
        empty = [
            [nn.Parameter(torch.empty(s, dtype=self._dtype, device="meta")) for s in self.row.shapes]
            for _ in self.weights
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
        whole = [[names[id(parameter)] for parameter in row] for row in matrices]
        self.places = [[state[name] for name in row] for row in whole]
        saved = {name: entry for name, entry in state.items() if name not in {n for row in whole for n in row}}
        for row, weights in enumerate(self.weights):
            for piece in self._pieces:
                values = weights.detach()[piece.begin : piece.end]
                place = self.places[row][piece.matrix]
                for number, part in enumerate(rectangles(place, piece.first, values, self.replica)):
                    saved[f"{whole[row][piece.matrix]} {number}"] = part
        return saved

    def shards(self) -> Iterator[tuple[Tensor, list[tuple[Place, int, slice]]]]:
        """For OptimizerState. Only after `in_checkpoint`."""
        for weights, places in zip(self.weights, self.places, strict=True) if self.trains else ():
            yield weights, [(places[p.matrix], p.first, slice(p.begin, p.end)) for p in self._pieces]

    def named_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's part of each row with the name that error messages give it."""
        for row, weights in enumerate(self.weights):
            yield f"{self.row_name(row)}, part {self.rank + 1} of {self.ranks}", weights
