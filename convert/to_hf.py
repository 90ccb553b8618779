"""Megatron checkpoint -> Hugging Face folder: weights, config, tokenizer, processor settings."""

import json
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from convert.hf_weights import HFWriter
from convert.megatron_weights import MegatronWeights
from convert.output import new_folder
from kanyun.errors import UserError
from trainer import checkpoint
from trainer.models.config import ModelConfig
from trainer.models.registry import family_of


def to_hf(source: str, out: Path, overwrite: bool = False) -> None:
    """Write `out`. `source` is a run, its checkpoints folder, or one step. Memory: one file (5 GB) and one tensor.

    Weights of a trained model are rounded (to nearest) to the dtype that config.json names; those of a converted,
    never trained one keep theirs, so that there and back is bit for bit the same. Raises UserError if a tensor is
    missing or left over, and as `resolve` and `new_folder` do.
    """
    step = checkpoint.resolve(source)
    folder = Path(step.path)
    config = ModelConfig.from_hf(str(folder / "hf"))
    rows, weights = family_of(config).table(config), MegatronWeights(folder)
    weights.require([row.megatron for row in rows])
    dtype = _dtype(folder / "hf" / "config.json") if checkpoint.read_state(step).step else None
    with new_folder(out, folder, overwrite) as attempt:
        shutil.copytree(folder / "hf", attempt, dirs_exist_ok=True)
        with HFWriter(attempt) as writer:
            for row in tqdm(rows, "converting", unit=" tensors"):
                parts = row.transform.to_hf(weights[row.megatron].to(dtype), config)
                for name, part in zip(row.hf, parts, strict=True):
                    writer.add(name, part)


def _dtype(config: Path) -> torch.dtype | None:
    """The dtype of the weights by config.json, or None if it names none. transformers 5 writes `dtype`."""
    settings = json.loads(config.read_text())
    name = settings.get("dtype") or settings.get("torch_dtype")
    dtype = getattr(torch, name, None) if name else None
    if name and not isinstance(dtype, torch.dtype):
        raise UserError(f"{config} names the dtype {name!r}: set it to bfloat16 or float32")
    return dtype
