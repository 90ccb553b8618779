"""Hugging Face folder -> megatron checkpoint of step 0, which the trainer takes as `init`."""

from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from convert.hf_weights import HFWeights
from convert.megatron_weights import WholeTensors
from convert.output import new_folder
from kanyun.errors import UserError
from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from trainer import checkpoint
from trainer.models.config import ModelConfig
from trainer.models.language import LanguageModel
from trainer.models.names import Row
from trainer.models.registry import family_of
from trainer.runtime import Runtime

TRAINED = (torch.float32, torch.bfloat16)


def to_megatron(source: Path, out: Path, overwrite: bool = False) -> None:
    """Write `out` like the output folder of a run, in the dtype of the source. Takes as much memory as the weights.

    Raises UserError if no family knows the source's model_type, or its tensors are not exactly the family's, and as
    `new_folder` does.
    """
    config, hf = ModelConfig.from_hf(str(source)), Folder(str(source))
    state = checkpoint.State(0, 0, 0, fingerprint(hf).digest, asdict(config), run={})
    family = family_of(config)
    rows, weights = family.table(config), HFWeights(source, family.canonical)
    weights.drop_copies(family.copies(config))
    weights.require([name for row in rows for name in row.hf])
    with new_folder(out, source, overwrite) as attempt:
        bar = tqdm(rows, "reading", unit=" tensors")
        tensors = WholeTensors({row.megatron: _converted(row, weights, config, source) for row in bar})
        print(f"writing {out}", flush=True)
        with Runtime.start():
            # It asks a model for nothing but its tensors.
            checkpoint.save(Folder(str(attempt)), state, cast(LanguageModel, tensors), None, hf)


def _converted(row: Row, weights: HFWeights, config: ModelConfig, source: Path) -> Tensor:
    parts = [weights[name] for name in row.hf]
    shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in zip(row.hf, parts))
    if parts[0].dtype not in TRAINED:
        raise UserError(f"{source}: {row.hf[0]} is {parts[0].dtype}: save the model as bfloat16 or float32 first")
    try:
        # A copy now, under the progress bar: megatron.core would make it later, of whatever is only a view of a file.
        return row.transform.to_megatron(parts, config).clone(memory_format=torch.contiguous_format)
    except RuntimeError as error:
        raise UserError(f"{source}: {shapes} do not fit config.json ({error}): give an unchanged model") from error
