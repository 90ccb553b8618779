"""Checkpoints of four small tensors, a file each: written as a run writes its own, but without model and ranks."""

from collections.abc import Callable

import torch

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer import checkpoint
from trainer.checkpoint import State
from trainer.checkpoint.parts import Part
from trainer.checkpoint.together import JointWriter, Save


def write_step(output: Folder, step: int, keep_last: int = 1, owns: Callable[[], bool] | None = None) -> Folder:
    """Return the checkpoint. Raises UserError as a save."""
    shape = (64, 64)
    parts = [
        Part(f"language.{n}", shape, (0, 0), shape, torch.float32, (torch.full(shape, float(n)),)) for n in range(4)
    ]
    state = State(step, 4 * step, 0, "tokenizer", {"num_layers": 4}, {"seed": 1, "length": 64})
    no_tokenizer = output / "no tokenizer"
    if error := JointWriter(output, no_tokenizer, keep_last, owns).write(Save(state, parts)):
        raise UserError(error)
    return checkpoint.checkpoints_of(output) / checkpoint.step_name(step)


def names(output: Folder) -> list[str]:
    return checkpoint.checkpoints_of(output).names()
