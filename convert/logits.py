"""Two models on the same input, logits side by side; each a Hugging Face folder or a megatron checkpoint.

Hugging Face folders are run by transformers, checkpoints by the trainer's own model: two programs that share no code.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convert.checks import TensorShapes
from convert.hf_weights import COMPUTED, HFWeights
from convert.meaning import accepted, require_same_meaning
from kanyun.errors import UserError
from kanyun.schema import Pack
from trainer import checkpoint
from trainer.checkpoint.reader import load
from trainer.data.batch import BatchFormat, make_batch
from trainer.models.config import ModelConfig
from trainer.models.initialize import build_model
from trainer.models.registry import family_of
from trainer.runtime import Runtime

TEXT = (
    "Describe the picture, then continue the story.\nOnce upon a time there were 1,234 cats in 北京; "
    "`def purr(n): return n * 'r'` was all they said. \U0001f431 Ça suffit."
)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SIZE = (308, 210)  # width, height: not square, and no multiple of the 112 pixels of an attention window
SHOWN = 8  # positions in the table


@dataclass(frozen=True)
class Input:
    """One sample: what transformers' processor makes of a prompt, and the image itself for our own loader."""

    input_ids: Tensor  # [n]
    processed: dict[str, Tensor]
    grid: np.ndarray  # [images, 3]: temporal, rows and columns of patches
    images: list[bytes]


@dataclass(frozen=True)
class Comparison:
    first: Tensor  # [n, vocabulary] float32
    second: Tensor

    @property
    def difference(self) -> Tensor:
        """[n, vocabulary]"""
        return (self.first - self.second).abs()

    @property
    def agreement(self) -> float:
        """Return the share of positions at which both models have the same most likely token."""
        return (self.first.argmax(-1) == self.second.argmax(-1)).float().mean().item()


def compare(first: Path, second: Path) -> tuple[Input, Comparison]:
    """Return the input and the logits of both models in float32, on the CPU and with one model in memory at a time.

    The input is made by the tokenizer and processor of `first`. Raises UserError if the two cannot have the same input.
    """
    kinds = [_kind(folder) for folder in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{first} is {kinds[0]}, {second} is {kinds[1]}: give two conversions of one model")
    sample = make_input(hf_folder(first))
    return sample, Comparison(*(_logits(folder, sample) for folder in (first, second)))


def summary(comparison: Comparison, tolerance: float) -> dict[str, Any]:
    """Return the comparison for a script; `within`: no logit differs by more than `tolerance`."""
    largest = comparison.difference.max().item()
    return {
        "largest_difference": largest,
        "mean_difference": comparison.difference.mean().item(),
        "same_most_likely_token": float(comparison.agreement),
        "tolerance": tolerance,
        "within": largest <= tolerance,  # false for NaN
    }


def report(first: Path, second: Path, sample: Input, comparison: Comparison, tolerance: float) -> bool:
    """Print the comparison; return whether no logit differs by more than `tolerance`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_folder(first))
    worst = comparison.difference.amax(-1)  # [n]
    print(f"A  {first}\nB  {second}\n{len(worst)} tokens, {len(sample.images)} image\n")
    print(f"{'position':>8}  {'token':20} {'A: next token, logit':28} {'B: next token, logit':28} {'difference':>10}")
    for at in sorted(worst.topk(min(SHOWN, len(worst))).indices.tolist()):
        token = repr(tokenizer.decode([int(sample.input_ids[at])]))
        tops = [
            (repr(tokenizer.decode([int(x[at].argmax())])), x[at].max().item())
            for x in (comparison.first, comparison.second)
        ]
        print(f"{at:8}  {token:20.20} " + " ".join(f"{t:18.18} {x:9.4f}" for t, x in tops) + f" {worst[at]:10.2e}")
    largest = worst.max().item()
    print(f"\nlogit difference: largest {largest:.2e}, mean {comparison.difference.mean().item():.2e}")
    print(f"same most likely token at {comparison.agreement:.2%} of the positions")
    within = largest <= tolerance  # false for NaN
    print(f"{'within' if within else 'OVER'} the tolerance of {tolerance:g}")
    return within


def make_input(folder: Path) -> Input:
    """The same prompt for every model; with a picture of smooth colours and noise if the model has a vision tower."""
    from transformers import AutoProcessor, AutoTokenizer

    if ModelConfig.from_hf(str(folder)).vision is None:
        with accepted(f"the tokenizer of {folder}"):
            ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
        return Input(ids[0], {"input_ids": ids}, np.empty((0, 3), np.int32), [])
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    picture = Image.fromarray(np.asarray(smooth) // 2 + rng.integers(0, 128, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    with accepted(f"the processor of {folder}"):
        processor = AutoProcessor.from_pretrained(folder)
        processed = dict(processor(text=[IMAGE + TEXT], images=[picture], return_tensors="pt"))
    grid = processed["image_grid_thw"].numpy().astype(np.int32)
    return Input(processed["input_ids"][0], processed, grid, [stream.getvalue()])


def _kind(folder: Path) -> str:
    config = ModelConfig.from_hf(str(hf_folder(folder)))
    return f"a {'vision' if config.vision else 'text'} model of {config.vocab_size} tokens"


def _logits(folder: Path, sample: Input) -> Tensor:
    return (transformers_logits if hf_folder(folder) == folder else megatron_logits)(folder, sample)


@torch.no_grad()
def transformers_logits(folder: Path, sample: Input) -> Tensor:
    """Return [n, vocabulary] float32. Raises UserError for weights that `to_megatron` refuses too."""
    import transformers

    config = ModelConfig.from_hf(str(folder))
    rows = family_of(config).table(config)
    require_same_meaning(folder, config)
    HFWeights(folder, config).require(rows, TensorShapes.of(folder, config, rows).hf)
    loader: Any = transformers.AutoModelForImageTextToText if config.vision else transformers.AutoModelForCausalLM
    with accepted(str(folder)):
        model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(name for name in info[fault] if not COMPUTED.search(str(name))):
            raise UserError(f"{folder}: transformers reports {fault} {names[:5]}: convert the model again")
    logits: Tensor = model.eval()(**sample.processed).logits[0]
    return logits


@torch.no_grad()
def megatron_logits(folder: Path, sample: Input) -> Tensor:
    """Return [n, vocabulary] float32, of the trainer's model on a pack with this one sample."""
    step = checkpoint.resolve(str(folder))
    config = ModelConfig.from_hf(str(hf_folder(folder)))
    length = len(sample.input_ids)
    pack = Pack(
        pack_id=0,
        input_ids=sample.input_ids.numpy().astype(np.int32),
        loss_mask=np.ones(length, bool),
        cu_seqlens=np.array([0, length], np.int32),
        sample_ids=np.zeros(1, np.uint64),
        dataset=["verify"],
        image_grid_thw=sample.grid,
        images=sample.images,
    )
    batch = make_batch([pack], BatchFormat.of(config))
    with Runtime.start() as runtime:
        model = build_model(config, runtime)
        load(step, model)
        return model.logits(batch)


def hf_folder(folder: Path) -> Path:
    """Return the folder with a model's config and tokenizer: the given one, or hf/ of a checkpoint."""
    if (folder / "config.json").exists():
        return folder
    return Path(checkpoint.resolve(str(folder)).path) / "hf"
