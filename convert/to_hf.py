"""Megatron checkpoint -> Hugging Face folder: weights, config, tokenizer, processor settings."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from convert.checks import TRAINED, TensorShapes, require_finite
from convert.hf_writer import HFWriter, Planned
from convert.megatron_weights import MegatronWeights
from convert.output import new_folder
from kanyun.cli.progress import Progress
from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer import checkpoint
from trainer.models.config import ModelConfig
from trainer.models.names import Row
from trainer.models.registry import family_of

THREADS = 2  # that read, convert and write a tensor each
TENSORS = ".distcp"  # how the names of files with tensors end


def to_hf(source: str, out: Path, overwrite: bool = False) -> None:
    """Write `out`. `source` is a run, its checkpoints folder, or one step. Memory: a few copies of the largest tensor.

    Weights of a trained model are rounded (to nearest) to the dtype that config.json names; those of a converted,
    never trained one keep theirs, so that there and back is bit for bit the same. Raises UserError if a tensor is
    missing, left over, of another shape or not finite, and as `newest_undamaged` and `new_folder` do.
    """
    step = newest_undamaged(source)
    folder = Path(step.path)
    config = ModelConfig.from_hf(str(folder / "hf"))
    rows, weights = family_of(config).table(config), MegatronWeights(folder)
    shapes = TensorShapes.of(folder / "hf", config, rows)
    weights.require(shapes.megatron)
    dtype = _dtype(folder / "hf" / "config.json") if checkpoint.read_state(step).step else None
    planned = [Planned(name, shapes.hf[name], dtype or weights.dtype(row.megatron)) for row in rows for name in row.hf]
    with new_folder(out, folder, overwrite) as attempt:
        shutil.copytree(folder / "hf", attempt, dirs_exist_ok=True)
        with (
            HFWriter(attempt, planned) as writer,
            Progress("converting", len(rows), "tensors") as progress,
            ThreadPoolExecutor(THREADS) as pool,
        ):

            def convert(row: Row) -> None:
                parts = row.transform.to_hf(weights[row.megatron].to(dtype), config)
                for name, part in zip(row.hf, parts, strict=True):
                    require_finite(folder, name, part)
                    writer.add(name, part)

            for _ in pool.map(convert, rows):
                progress.advance()


def newest_undamaged(source: str) -> Folder:
    """Return the checkpoint that `source` stands for, whose files have their digests; say which newer ones have not.

    Raises UserError if there is none, or if `source` is a damaged step itself.
    """
    damaged: dict[str, str] = {}
    while True:
        lookup = checkpoint.look_up(source, damaged)
        assert lookup.newest is not None
        try:
            checkpoint.require_digests(lookup.newest, lambda name: not name.endswith(TENSORS))
            of_weights = MegatronWeights(Path(lookup.newest.path)).files
            checkpoint.require_digests(lookup.newest, of_weights.__contains__)  # the optimizer's are six times as large
        except checkpoint.DamagedError as error:
            if lookup.named:
                raise
            damaged[lookup.newest.uri] = str(error)
            continue
        for sentence in lookup.sentences:
            print(sentence, flush=True)
        return lookup.newest


def _dtype(config: Path) -> torch.dtype | None:
    """Return the dtype of the weights by config.json, or None if it names none. transformers 5 writes `dtype`."""
    settings = json.loads(config.read_text())
    name = settings.get("dtype") or settings.get("torch_dtype")
    dtype = getattr(torch, name, None) if name else None
    if name and dtype not in TRAINED:
        raise UserError(f"{config} names the dtype {name!r}: set it to bfloat16 or float32")
    return dtype
