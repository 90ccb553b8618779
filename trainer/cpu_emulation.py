"""Emulation of the CUDA calls that megatron.core hard-codes, for training on a CPU. Nothing is emulated elsewhere."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode


class CpuAsCuda(TorchFunctionMode):
    """While entered, every "cuda" device is the CPU, and streams and events do nothing. Costs 1.6 us a torch call."""

    def __init__(self) -> None:
        super().__init__()
        self._stubs: list[tuple[Any, str, Any]] = [
            (torch.cuda, "current_device", lambda: "cpu"),
            (torch.cuda, "synchronize", _nothing),
            (torch.cuda, "current_stream", _Stream),
            (torch.cuda, "stream", _Stream),
            (torch.cuda, "Stream", _Stream),
            (torch.cuda, "Event", _Stream),
        ]
        self._saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for owner, name, stub in self._stubs:
            self._saved.append((owner, name, getattr(owner, name)))
            setattr(owner, name, stub)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for owner, name, original in self._saved:
            setattr(owner, name, original)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")  # DistributedOptimizer compares the names of types
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _cpu(kwargs["device"])}
        if func is torch.Tensor.to:
            args = tuple(_cpu(arg) for arg in args)
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream, event, or context of one, where all work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def compile_nothing(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Stand in for torch.compile, also as a decorator with options: return the function as it is."""
    return function if function is not None else compile_nothing


def _nothing(*args: Any) -> None:
    pass


def _cpu(device: Any) -> Any:
    return "cpu" if isinstance(device, str | torch.device) and str(device).startswith("cuda") else device
