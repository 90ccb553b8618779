"""Hugging Face folder -> the same model with an embedding row for every token of its tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.checks import TensorShapes, check_generation
from convert.hf_weights import HFWeights
from convert.hf_writer import HFWriter, Planned
from convert.meaning import meaning_compared
from convert.output import new_folder
from kanyun.cli.progress import track
from kanyun.errors import UserError
from kanyun.fingerprint import copy_tokenizer, largest_token
from kanyun.storage import Folder
from trainer.models.config import ModelConfig
from trainer.models.names import EMBEDDING, HEAD
from trainer.models.registry import family_of

MULTIPLE = 128  # of rows: what matrix products and tensor parallelism want, as Qwen's own 151,936 and 152,064


def resize_vocab(source: Path, out: Path, overwrite: bool = False) -> int:
    """Write `out` with new rows of embedding and output head, the mean of the old ones each; return their number.

    There are then as many rows as the tokenizer has ids, rounded up to a multiple of 128. Raises UserError if the model
    has a row for every token already, and as `to_megatron` does.
    """
    config, (token, largest) = ModelConfig.from_hf(str(source)), largest_token(Folder(str(source)))
    if largest < config.vocab_size:
        raise UserError(
            f"{source} has {config.vocab_size} embedding rows, enough for its last token {token!r} with id {largest}: "
            "use it as it is"
        )
    check_generation(source)
    vocab_size = -(-(largest + 1) // MULTIPLE) * MULTIPLE
    rows, weights = family_of(config).table(config), HFWeights(source, config)
    shapes = TensorShapes.of(source, config, rows)
    weights.require(rows, shapes.hf)
    names = [name for row in rows for name in row.hf]
    resized = {name for row in rows if row.megatron in (EMBEDDING.megatron, HEAD.megatron) for name in row.hf}
    planned = [
        Planned(
            name,
            (vocab_size, *shapes.hf[name][1:]) if name in resized else shapes.hf[name],
            weights.dtype(name),
        )
        for name in names
    ]
    with new_folder(out, source, overwrite) as attempt, meaning_compared(source, config):
        copy_tokenizer(Folder(str(source)), Folder(str(attempt)))
        if (source / "generation_config.json").exists():
            (attempt / "generation_config.json").write_bytes((source / "generation_config.json").read_bytes())
        settings = json.loads((source / "config.json").read_bytes())
        (attempt / "config.json").write_text(json.dumps(_with_vocab_size(settings, vocab_size), indent=2) + "\n")
        with HFWriter(attempt, planned, source) as writer:
            for name in track(names, "copying", "tensors"):
                (tensor,) = weights.read(name)
                writer.add(name, _grown(tensor, vocab_size) if name in resized else tensor)
    return vocab_size - config.vocab_size


def _grown(rows: Tensor, count: int) -> Tensor:
    """Return `rows` [V, H] with their mean repeated below, [count, H]."""
    mean = rows.mean(0, dtype=torch.float32).to(rows.dtype)
    return torch.cat([rows, mean.expand(count - len(rows), -1)])


def _with_vocab_size(settings: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return config.json with the new size wherever it names one: at the root, in text_config, or in both."""
    changed = {**settings, "vocab_size": vocab_size} if "vocab_size" in settings else dict(settings)
    if "vocab_size" in changed.get("text_config", {}):
        changed["text_config"] = {**changed["text_config"], "vocab_size": vocab_size}
    return changed
