"""Folders of Hugging Face models to convert, tiny and with random weights, and what is compared of them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.processes import run_python
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder

WEIGHTS = "model.safetensors"


def hf_model(folder: Path, *, vision: bool, tied: bool = True, dtype: str = "float32", nested: bool = False) -> Path:
    """A tiny Hugging Face folder; `nested`: with the names that some 4.x versions of transformers wrote."""
    (tiny_vl_folder if vision else tiny_text_folder)(folder, tied=tied)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(folder / WEIGHTS).items()}
    if nested:
        moved = {name: name.replace("model.", "model.language_model.", 1) for name in tensors if name[:6] == "model."}
        moved |= {name: f"model.{name}" for name in tensors if name.startswith("visual.")}
        assert len(moved) > 60
        tensors = {moved.get(name, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, dtype=dtype)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    # Of the same size: a checkpoint records its files' sizes.
    (folder / "config.json").write_text(json.dumps(config | changes).ljust((folder / "config.json").stat().st_size))


def convert(*arguments: Any) -> "subprocess.CompletedProcess[str]":
    return run_python(["-m", "convert", *map(str, arguments)])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name
