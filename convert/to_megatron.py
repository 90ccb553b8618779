"""Hugging Face folder -> megatron checkpoint of step 0, which the trainer takes as `init`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from convert.checks import TensorShapes, check_generation
from convert.hf_weights import HFWeights
from convert.meaning import meaning_compared
from convert.output import new_folder
from kanyun.cli.progress import Progress
from kanyun.errors import UserError
from kanyun.fingerprint import check_model, fingerprint
from kanyun.storage import Folder
from trainer import checkpoint
from trainer.checkpoint.parts import Part, alone
from trainer.checkpoint.together import write_alone
from trainer.models.config import ModelConfig
from trainer.models.names import Row
from trainer.models.registry import family_of


@dataclass(frozen=True)
class Converted(Part):
    """A tensor of the checkpoint that is read and converted when it is written, so that few are in memory at once."""

    make: Callable[[], Tensor]

    def values(self) -> Tensor:
        return self.make()


def to_megatron(source: Path, out: Path, overwrite: bool = False) -> None:
    """Write `out` like the output folder of a run, in the dtype of the source. Memory: the four largest tensors, twice.

    Every shape, dtype and name is checked before the first tensor is read. Raises UserError if the source is no model
    of a known family, if a tensor is not what config.json says or not finite, and as `new_folder` does.
    """
    config, hf = ModelConfig.from_hf(str(source)), Folder(str(source))
    state = checkpoint.State(0, 0, 0, fingerprint(hf).digest, asdict(config), run={})
    check_model(hf)
    check_generation(source)
    _check_image_token(config, source)
    rows, weights = family_of(config).table(config), HFWeights(source, config)
    shapes = TensorShapes.of(source, config, rows)
    weights.require(rows, shapes.hf)
    with (
        new_folder(out, source, overwrite) as attempt,
        meaning_compared(source, config),
        Progress("converting", len(rows), "tensors") as progress,
    ):

        def convert(row: Row) -> Tensor:
            tensor = row.transform.to_megatron(weights.read(*row.hf), config)
            progress.advance()
            return alone(tensor)

        parts = [
            Converted(
                key=row.megatron,
                global_shape=(shape := shapes.megatron[row.megatron]),
                at=(0,) * len(shape),
                shape=shape,
                dtype=weights.dtype(row.hf[0]),
                sources=(),
                make=partial(convert, row),
            )
            for row in rows
        ]
        write_alone(Folder(str(attempt)), state, parts, hf)


def _check_image_token(config: ModelConfig, source: Path) -> None:
    """Raises UserError if config.json calls another token the image's than the tokenizer does."""
    built = fingerprint(Folder(str(source))).token_ids.get("<|image_pad|>")
    if config.vision and built is not None and built != config.image_token_id:
        raise UserError(
            f"{source}/config.json has image_token_id {config.image_token_id}, but the tokenizer's <|image_pad|> is "
            f"{built}: correct config.json"
        )
