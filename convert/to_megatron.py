"""Hugging Face folder -> megatron checkpoint of step 0, which the trainer takes as `init`."""

from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from convert.checks import Layout, require_finite
from convert.hf_weights import HFWeights
from convert.megatron_weights import WholeTensors
from convert.output import new_folder
from kanyun.cli.progress import track
from kanyun.fingerprint import check_vocabulary, fingerprint
from kanyun.storage import Folder
from trainer import checkpoint
from trainer.models.config import ModelConfig
from trainer.models.language import LanguageModel
from trainer.models.names import Row
from trainer.models.registry import family_of
from trainer.runtime import Runtime


def to_megatron(source: Path, out: Path, overwrite: bool = False) -> None:
    """Write `out` like the output folder of a run, in the dtype of the source. Takes as much memory as the weights.

    Every shape, dtype and name is checked before the first tensor is read. Raises UserError if the source is no model
    of a known family, if a tensor is not what config.json says or not finite, and as `new_folder` does.
    """
    config, hf = ModelConfig.from_hf(str(source)), Folder(str(source))
    state = checkpoint.State(0, 0, 0, fingerprint(hf).digest, asdict(config), run={})
    check_vocabulary(hf)
    rows, weights = family_of(config).table(config), HFWeights(source, config)
    weights.require(rows, Layout.of(source, config, rows).hf)
    with new_folder(out, source, overwrite) as attempt:
        read = track(rows, "reading", "tensors")
        tensors = WholeTensors({row.megatron: _converted(row, weights, config, source) for row in read})
        print(f"writing {out}", flush=True)
        with Runtime.start():
            # It asks a model for nothing but its tensors.
            checkpoint.save(Folder(str(attempt)), state, cast(LanguageModel, tensors), None, hf)


def _converted(row: Row, weights: HFWeights, config: ModelConfig, source: Path) -> Tensor:
    parts = [weights[name] for name in row.hf]
    for name, part in zip(row.hf, parts):
        require_finite(source, name, part)
    # A copy now, under the progress bar: megatron.core would make it later, of what is only a view of a file.
    return row.transform.to_megatron(parts, config).clone(memory_format=torch.contiguous_format)
