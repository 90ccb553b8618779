"""The layers' matrices in fp8, cast once a step and not in every micro-batch.

A cast reads a matrix twice, once for its largest value, and writes it as it is and transposed: 6 bytes a parameter.
Here a micro-batch only transposes what is in 8 bits already, for its backward pass: 2 bytes. Where there is memory for
one byte a parameter more, transposes are kept too. 3B, 16 packs a step on an H100: 3,688, 3,626 and 3,601 ms.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.optim.rows import fp8_parameter, is_in_main_grad, matrices_of, scales_of, set_matrices


class Fp8Weights:
    """Puts fp8 copies of the matrices of `layers` in their places. The bfloat16 masters are still what is optimized,
    saved and loaded: whoever looks at the model's parameters for one of these does it within `masters`.

    `on_gradient`: given a master, returns what is called after each of its gradients. `transposes`: keep them.
    Call `cast` after the masters have changed.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        on_gradient: Callable[[nn.Parameter], Callable[..., None]],
        *,
        transposes: bool,
    ) -> None:
        self._owners = [owner for layer in layers for owner in matrices_of(layer)]
        self._masters = [module.get_parameter(name) for module, name in self._owners]
        self._number = {master: number for number, master in enumerate(self._masters)}
        device = self._masters[0].device
        self._values = [torch.empty(master.shape, dtype=torch.uint8, device=device) for master in self._masters]
        # What an fp8 value is multiplied by. cuBLAS wants each aligned to 16 bytes.
        self._scales = list(torch.ones(len(self._masters), 4, device=device)[:, :1])
        shapes = [(columns, rows) if transposes else (0, 0) for rows, columns in (m.shape for m in self._masters)]
        self._transposes = [torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes]
        parts = zip(self._values, self._scales, self._masters, strict=True)
        self._copies = [fp8_parameter(values, scale, master) for values, scale, master in parts]
        self._keeps = transposes
        for copy, transpose, master in zip(self._copies, self._transposes, self._masters, strict=True):
            if transposes:
                copy._transpose, copy._transpose_invalid = transpose, False  # type: ignore[attr-defined]
            if master.requires_grad:
                copy.main_grad = master.main_grad  # type: ignore[attr-defined]
                copy.grad_added_to_main_grad = False  # type: ignore[attr-defined]
                copy.register_post_accumulate_grad_hook(self._gradient_hook(on_gradient(master)))
        set_matrices(self._owners, self._copies)
        self.cast()

    @torch.no_grad()
    def cast(self, parameters: Collection[nn.Parameter] | None = None) -> None:
        """Cast those of `parameters` that are masters, or all masters, on the current stream."""
        from trainer.kernels.cast import cast_to_e4m3, fp8_transpose

        numbers = [self._number[p] for p in (self._masters if parameters is None else parameters) if p in self._number]
        if not numbers:
            return
        masters = [self._masters[number].detach() for number in numbers]
        scales = scales_of(masters)
        torch._foreach_copy_([self._scales[number] for number in numbers], list((1 / scales).split(1)))
        for number, master, scale in zip(numbers, masters, scales, strict=True):
            cast_to_e4m3(master, scale, self._values[number])
            if self._keeps:
                fp8_transpose(self._values[number], self._transposes[number])

    @contextmanager
    def masters(self) -> Iterator[None]:
        """Put the masters back into the layers for the `with` block."""
        set_matrices(self._owners, self._masters)
        try:
            yield
        finally:
            set_matrices(self._owners, self._copies)

    def _gradient_hook(self, then: Callable[..., None]) -> Callable[[Tensor], None]:
        def hook(copy: Any) -> None:
            if not is_in_main_grad(copy):
                copy.main_grad.add_(copy.grad)
            copy.grad, copy.grad_added_to_main_grad = None, False
            if not self._keeps:  # Transformer Engine would, and not know when they are stale
                copy._transpose, copy._transpose_invalid = None, True
            then()

        return hook
