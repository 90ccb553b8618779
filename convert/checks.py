"""What a model's tensors must be, by its config.json, and every way in which those of a folder differ from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.memory import is_finite, pieces
from kanyun.errors import UserError
from trainer.models.config import ModelConfig
from trainer.models.names import Row
from trainer.models.registry import family_of

Shape = tuple[int, ...]
TRAINED = (torch.bfloat16, torch.float32)  # dtypes that the trainer reads and writes
LISTED = 6  # faults, and names in one fault, that a message spells out


@dataclass(frozen=True)
class TensorShapes:
    """The shape of every tensor of one model, by its name on either side."""

    hf: Mapping[str, Shape]
    megatron: Mapping[str, Shape]

    @classmethod
    def of(cls, where: Path, config: ModelConfig, rows: Sequence[Row]) -> "TensorShapes":
        """Return the shapes of a model with the tensors of `rows`.

        Raises UserError, naming `where`, if heads are no whole groups, or channels of the tower no whole heads.
        """
        wholes = {f"{config.num_heads} heads": (config.num_heads, config.num_kv_heads, "key-value heads")}
        if vision := config.vision:
            wholes[f"{vision.hidden_size} channels of the tower"] = (vision.hidden_size, vision.num_heads, "heads")
        for what, (whole, parts, name) in wholes.items():
            if whole % parts:
                raise UserError(
                    f"{where}/config.json has {what}, no multiple of its {parts} {name}: give a model of one of the "
                    "released architectures"
                )
        widths = family_of(config).widths(config)
        hf = {row.megatron: row.hf_shapes(widths) for row in rows}
        megatron = {row.megatron: row.transform.shape(list(hf[row.megatron].values()), config) for row in rows}
        return cls({name: shape for shapes in hf.values() for name, shape in shapes.items()}, megatron)


def check_generation(folder: Path) -> None:
    """Raise UserError if transformers could not read generation_config.json, which goes where the model goes."""
    path = folder / "generation_config.json"
    try:
        if path.exists() and not isinstance(json.loads(path.read_text("utf-8")), dict):
            raise ValueError("it is no object of names and values")
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again, or delete it") from error


def shape_faults(stored: Mapping[str, tuple[Shape, Any]], expected: Mapping[str, Shape]) -> list[str]:
    """List each difference between `stored` (name -> shape, dtype) and the shapes by config.json; [] if none."""
    faults = [
        f"{name} has shape {list(shape)}, by config.json {list(expected[name])}"
        for name, (shape, _) in stored.items()
        if name in expected and tuple(shape) != expected[name]
    ]
    stored = {name or "''": tensor for name, tensor in stored.items()}
    others = {str(dtype) for name, (_, dtype) in stored.items() if name in expected and dtype not in TRAINED}
    for other in sorted(others):
        names = [name for name, (_, dtype) in stored.items() if str(dtype) == other]
        faults.append(f"{_listed(names, ', ')} {_are(names)} {other}, not bfloat16 or float32 (save the model in one)")
    missing, left_over = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    for what, names in (("missing", sorted(missing)), ("left over", sorted(left_over))):
        if names:
            faults.append(f"{_listed(names, ', ')} {_are(names)} {what}")
    return faults


def refuse(where: Path, faults: Sequence[str]) -> None:
    """Raise UserError naming the faults of the model at `where`, if there are any."""
    if faults:
        raise UserError(f"{where}: {_listed(faults, '; ')}: give a whole and unchanged model")


def require_finite(where: Path, name: str, tensor: Tensor) -> None:
    """Raise UserError if the tensor holds a NaN or an infinite value, naming the first one."""
    if not all(map(is_finite, pieces(tensor))):
        at = next(iter((~torch.isfinite(tensor)).nonzero())).tolist()
        value = tensor[tuple(at)].item()
        raise UserError(f"{where}: {name} holds {value} at {at}: give a model whose weights are all finite")


def _listed(items: Sequence[str], separator: str) -> str:
    return separator.join(items[:LISTED]) + (f" and {len(items) - LISTED} more" if len(items) > LISTED else "")


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
