"""Megatron checkpoint -> Hugging Face folder: weights, config, tokenizer, processor settings."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from convert.checks import TRAINED, TensorShapes
from convert.hf_writer import HFWriter, Planned
from convert.megatron_weights import MegatronWeights
from convert.output import new_folder
from kanyun.cli.progress import Progress
from kanyun.storage import Folder
from trainer import checkpoint
from trainer.checkpoint.faults import require_digests
from trainer.models.config import ModelConfig
from trainer.models.names import Row
from trainer.models.registry import family_of

THREADS = 4  # that read, convert and write a tensor each: one waits for the disk while another computes
TENSORS = ".distcp"  # how the names of files with tensors end


def to_hf(source: str, out: Path, overwrite: bool = False) -> None:
    """Write `out`. `source` is a run, its checkpoints folder, or one step. Memory: the two largest tensors, twice.

    Of a run, the newest checkpoint whose files have their digests is taken, and newer ones are named with what is wrong
    with them. Weights of a trained model are rounded (to nearest) to bfloat16 or float32 if config.json names it; those
    of a converted, never trained one keep theirs, so that there and back is bit for bit the same. Raises UserError if
    there is no such checkpoint, if a tensor is missing, left over, of another shape or not finite, and as `new_folder`
    does.
    """
    damaged: dict[str, str] = {}
    said: list[str] = []
    while True:
        lookup = checkpoint.look_up(source, damaged)
        assert lookup.newest is not None
        for sentence in lookup.sentences:
            if sentence not in said:
                print(sentence, flush=True)
                said.append(sentence)
        try:
            _convert(lookup.newest, out, overwrite)
            return
        except checkpoint.DamagedError as error:
            if lookup.named:
                raise
            damaged[lookup.newest.uri] = str(error)


def _convert(step: Folder, out: Path, overwrite: bool) -> None:
    """Raises DamagedError if a file has not its digest: nothing is left of `out` then."""
    require_digests(step, lambda name: not name.endswith(TENSORS))
    folder = Path(step.path)
    config = ModelConfig.from_hf(str(folder / "hf"))
    rows, weights = family_of(config).table(config), MegatronWeights(step)
    shapes = TensorShapes.of(folder / "hf", config, rows)
    weights.require(shapes.megatron)
    dtype = _dtype(folder / "hf" / "config.json") if checkpoint.read_state(step).step else None
    planned = [Planned(name, shapes.hf[name], dtype or weights.dtype(row.megatron)) for row in rows for name in row.hf]
    with new_folder(out, folder, overwrite) as attempt, weights.checked():
        for name, _ in (step / "hf").files():
            Folder(str(attempt)).write(name, (step / "hf").read(name))
        with (
            HFWriter(attempt, planned, folder) as writer,
            Progress("converting", len(rows), "tensors") as progress,
            ThreadPoolExecutor(THREADS) as pool,
        ):

            def convert(row: Row) -> None:
                for name, part in zip(row.hf, row.transform.to_hf(weights[row.megatron], config), strict=True):
                    writer.add(name, part)

            for _ in pool.map(convert, sorted(rows, key=lambda row: weights.place(row.megatron))):
                progress.advance()


def _dtype(config: Path) -> torch.dtype | None:
    """Return the dtype that config.json names for the weights; None: none, or one that the trainer does not write."""
    settings = json.loads(config.read_text())
    name = settings.get("dtype") or settings.get("torch_dtype")  # transformers 5 writes the first
    if name is None:
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype in TRAINED:
        return dtype
    print(f"{config.name} names the dtype {name!r}: weights stay as they were trained", flush=True)
    return None
