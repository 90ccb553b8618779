"""How a layer's matrices lie in a row that ranks share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNED = 256  # elements: where a matrix, and a part, begins
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Piece:
    """Elements of one matrix that lie in a rank's part of a row."""

    matrix: int
    first: int  # of the matrix
    begin: int  # of the part
    end: int


class Row:
    """Matrices of these shapes one after the other, cut into `ranks` equal parts of a multiple of `alignment`."""

    def __init__(self, shapes: Sequence[torch.Size], ranks: int, alignment: int = ALIGNED) -> None:
        self.shapes, self.starts, end = list(shapes), [], 0
        for shape in shapes:
            self.starts.append(end)
            end += -(-shape.numel() // alignment) * alignment
        self.part = -(-end // (alignment * ranks)) * alignment  # elements

    def pieces(self, rank: int) -> Iterator[Piece]:
        """Yield what a rank's part has of each matrix."""
        low, high = rank * self.part, (rank + 1) * self.part
        for matrix, (start, shape) in enumerate(zip(self.starts, self.shapes, strict=True)):
            begin, end = max(low, start), min(high, start + shape.numel())
            if begin < end:
                yield Piece(matrix, begin - start, begin - low, end - low)


def matrices_of(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the module and the name of each matrix of a layer."""
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2:
                yield module, name


def set_matrices(owners: Sequence[tuple[nn.Module, str]], parameters: Sequence[nn.Parameter]) -> None:
    """Set `parameters` in the modules, under the names, that `matrices_of` yields."""
    for (module, name), parameter in zip(owners, parameters, strict=True):
        setattr(module, name, parameter)


def is_in_main_grad(parameter: Any) -> bool:
    """Return whether a matrix product of Transformer Engine has put the gradient into main_grad itself.

    What it hands over is then a dummy, or an alias of main_grad.
    """
    return parameter.grad_added_to_main_grad or bool(parameter.grad.data_ptr() == parameter.main_grad.data_ptr())


def scales_of(matrices: Sequence[Tensor]) -> Tensor:
    """Return the factor of each matrix before its cast to e4m3, float32: its largest value decides it."""
    return e4m3_scales(torch.stack(torch._foreach_norm(list(matrices), float("inf"))).float())


def e4m3_scales(largest: Tensor) -> Tensor:
    """Return the scale of each of these largest values, 1 where all values are 0."""
    return torch.where(largest > 0, E4M3_MAX / largest, 1.0)


def fp8_parameter(data: Tensor, scale: Tensor, old: nn.Parameter) -> nn.Parameter:
    """Return a parameter of Transformer Engine over fp8 values of the shape of `old`, and what one is multiplied by."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Tensor

    quantizer = Float8CurrentScalingQuantizer(DType.kFloat8E4M3, data.device)
    values = Float8Tensor(
        shape=old.shape,
        dtype=old.dtype,
        data=data,
        fp8_scale_inv=scale,
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=quantizer,
    )
    return nn.Parameter(values, requires_grad=old.requires_grad)
