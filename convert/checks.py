"""What a model's tensors must be, by its config.json, and every way in which those of a folder differ from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.memory import pieces
from kanyun.errors import UserError
from trainer.checkpoint.faults import is_finite
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
    def of(cls, folder: Path, config: ModelConfig, rows: Sequence[Row]) -> "TensorShapes":
        """Return the shapes of the model that transformers makes of the config.json in `folder`; no memory is used.

        The megatron side follows from the table's transforms. Raises UserError if transformers refuses config.json, or
        if its tensors are not those that the trainer's model has.
        """
        tensors = _meta_tensors(folder, config)
        try:
            hf = {name: tensors[name] for row in rows for name in row.hf}
            megatron = {row.megatron: row.transform.to_megatron([hf[name] for name in row.hf], config) for row in rows}
            for row in rows:
                for name, part in zip(row.hf, row.transform.to_hf(megatron[row.megatron], config), strict=True):
                    if part.shape != hf[name].shape:
                        raise RuntimeError(f"{name} {list(hf[name].shape)} would come back as {list(part.shape)}")
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"{folder}/config.json describes tensors that the trainer's model does not have ({error}): "
                "give a model of one of the released architectures"
            ) from error
        return cls(*({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (hf, megatron)))


def _meta_tensors(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return transformers' model without weights: canonical name -> tensor on the meta device."""
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(folder)
        loader: Any = transformers.AutoModelForImageTextToText if config.vision else transformers.AutoModelForCausalLM
        with torch.device("meta"):
            model = loader.from_config(settings)
        _require_same_meaning(folder, config, settings.get_text_config())
    except UserError:
        raise
    except Exception as error:  # any error of its validators is about config.json
        raise UserError(f"transformers refuses {folder}/config.json ({_last_line(error)}): correct it") from error
    canonical = family_of(config).canonical
    return {canonical(name): tensor for name, tensor in model.state_dict().items()}


def _require_same_meaning(folder: Path, config: ModelConfig, text: Any) -> None:
    """Raise UserError if transformers' decoder `text` computes something else than the trainer's, in equal shapes.

    config.json may spell a setting in two places; which one counts has changed over transformers' versions.
    """
    rope = text.rope_parameters
    rope_type = "default" if rope["rope_type"] == "mrope" else rope["rope_type"]
    other_layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    meanings = {
        "rope type": (rope_type, "default"),
        "rope_theta": (rope["rope_theta"], config.rope_theta),
        "rms_norm_eps": (text.rms_norm_eps, config.norm_eps),
        "hidden_act": (text.hidden_act, "silu"),
        "layer_types": (min(other_layers, default="full_attention"), "full_attention"),
    }
    if config.vision:
        meanings["mrope_section"] = (list(rope["mrope_section"]), list(config.mrope_section))
    for name, (theirs, ours) in meanings.items():
        if theirs != ours:
            raise UserError(
                f"{folder}/config.json means {name} {theirs} to transformers, and {ours} to the trainer: leave the "
                "spelling that the model was trained with, if the trainer has it"
            )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def check_generation(folder: Path) -> None:
    """Raise UserError if transformers could not read generation_config.json, which goes where the model goes."""
    path = folder / "generation_config.json"
    try:
        if path.exists() and not isinstance(json.loads(path.read_bytes()), dict):
            raise ValueError("it is no object of names and values")
    except (ValueError, OSError) as error:
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
