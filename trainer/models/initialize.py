"""Making a model: its modules, its initial weights, and which of them train."""

from functools import partial
from zlib import crc32

import torch
from torch import Tensor, nn

from kanyun.errors import UserError
from trainer.models.config import BFLOAT16, Compute, ModelConfig
from trainer.models.language import LanguageModel
from trainer.models.registry import family_of
from trainer.runtime import Runtime


def build_model(
    config: ModelConfig, runtime: Runtime, *, trainable: str = "all", compute: Compute = BFLOAT16
) -> LanguageModel:
    """Return the model of the config's family on the runtime's device, with random weights.

    The weights depend on the runtime's seed (and on CPU or CUDA), not on the number of processes. Raises UserError for
    a `trainable` that names no part of this model, or a tensor-parallel size that does not divide it.
    """
    model = family_of(config).build(config, runtime, compute)
    freeze(model, trainable)
    if runtime.weight_shards > 1:
        model.shard(runtime)
    initialize(model, runtime)
    model.publish()
    return model


def freeze(model: LanguageModel, trainable: str) -> None:
    """Let only the named parts train: all, or some of language, vision, merger, joined by "+".

    `vision` is the tower without its merger. The merger (the projection into the language model) is a separate part,
    because it is often trained first, alone. Raises UserError for a part that this model doesn't have.
    """
    parts = {name: _part(name) for name, _ in model.named_parameters()}
    known = list(dict.fromkeys(parts.values()))
    wanted = known if trainable == "all" else trainable.split("+")
    for part in wanted:
        if part not in known:
            raise UserError(f"trainable: {part!r} is no part of this model: all, or some of {'+'.join(known)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts[name] in wanted)


def _part(name: str) -> str:
    return "merger" if name.startswith("vision.merger.") else name.split(".")[0]


@torch.no_grad()
def initialize(model: LanguageModel, runtime: Runtime) -> None:
    """Draw weights as transformers does: matrices normal(0, initializer_range), biases 0, norms 1.

    Each matrix has its own generator, seeded by its name, and is drawn whole; of a split or sharded one, a rank takes
    its part.
    """
    config = model.model_config
    sharded = {
        matrix: partial(shards.take, row, column)
        for shards in model.sharded
        for row, matrices in enumerate(shards.parameters)
        for column, matrix in enumerate(matrices)
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        vision = config.vision if name.startswith("vision.") else None
        std = vision.initializer_range if vision else config.initializer_range
        generator = torch.Generator(runtime.device).manual_seed(crc32(f"{runtime.seed} {name}".encode()))
        take = sharded.get(parameter, parameter.copy_)
        take(_draw(parameter, std, generator, runtime))
    model.clear_padding()


def _draw(parameter: nn.Parameter, std: float, generator: torch.Generator, runtime: Runtime) -> Tensor:
    """Return this rank's part of a whole normal(0, std) matrix."""
    split = runtime.tensor_parallel if getattr(parameter, "tensor_model_parallel", False) else 1
    dim, stride = 0, 1
    if split > 1:
        dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    shape = list(parameter.shape)
    shape[dim] *= split
    whole = torch.empty(shape, device=runtime.device).normal_(0.0, std, generator=generator)
    # Gate and up rows of a gated MLP are split separately ("stride" 2): a rank has both rows of the same neurons.
    strides = whole.chunk(stride, dim)
    return torch.cat([part.chunk(split, dim)[runtime.tp_rank if split > 1 else 0] for part in strides], dim)
