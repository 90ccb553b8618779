"""The stages in their order: the command line, the recipe and the page of the row flow are made from this table.

Classes are named, not imported: `--help` and a mistyped option answer at once, without Spark.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kanyun.errors import UserError

if TYPE_CHECKING:
    from pipeline.stages.base import Stage


@dataclass(frozen=True)
class StageEntry:
    """A stage as commands and recipes know it."""

    name: str  # its module in this package, too
    class_name: str
    text: str  # one line of help
    example: str = field(kw_only=True)  # arguments of a command, for help
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # name of a setting -> arguments of argparse
    per_path: bool = False  # runs once a data path; the others, once for all
    folder: str = ""  # in a recipe's output; "" = the stage's name

    @property
    def output(self) -> str:
        return self.folder or self.name

    def load(self) -> "type[Stage]":
        stage: type[Stage] = getattr(import_module(f"pipeline.stages.{self.name}"), self.class_name)
        return stage


_LENGTH = {"required": True, "type": int, "metavar": "N"}
_NUMBER = {"type": int, "default": 0, "metavar": "N"}

STAGES = (
    StageEntry(
        "preprocess",
        "PreprocessStage",
        "raw rows to checked samples, images to blobs",
        example="raw/charts work/preprocess --dataset llava",
        options={"dataset": {"required": True, "metavar": "NAME", "help": "messages, llava, text, or one you added"}},
        per_path=True,
    ),
    StageEntry(
        "filter",
        "FilterStage",
        "clean rows to data/, bad ones and duplicates to quarantine/",
        example="work/preprocess work/filter/charts",
        options={"near_duplicates": {"choices": ["keep", "drop"], "default": "keep", "help": "images that look alike"}},
        per_path=True,
    ),
    StageEntry(
        "sample",
        "SampleStage",
        "how many copies of each sample an epoch has",
        example="work/filter work/sample --ratios ratios.yaml --epoch 0",
        options={
            "ratios": {"metavar": "YAML", "help": "data path: ratio; default: pipeline/constants.py"},
            "epoch": _NUMBER,
            "seed": _NUMBER,
        },
    ),
    StageEntry(
        "build",
        "BuildStage",
        "chat template, tokens, loss mask",
        example="work/sample work/build --tokenizer models/Qwen2.5-VL-3B-Instruct --length 8192",
        options={
            "tokenizer": {"required": True, "metavar": "DIR", "help": "Hugging Face folder"},
            "length": {**_LENGTH, "help": "token slots a pack"},
            "overflow": {"choices": ["drop", "split"], "default": "drop", "help": "over-long text documents"},
        },
    ),
    StageEntry(
        "pack",
        "PackStage",
        "samples to packs: OUT/packed_length_N_PART_epoch_EPOCH_v4",
        example="work/build packed --length 8192",
        options={
            "length": {**_LENGTH, "help": "token slots a pack, as in build"},
            "part": {**_NUMBER, "help": "tells several packed folders apart"},
            "epoch": {"type": int, "metavar": "N", "help": "as in sample; default: what was sampled"},
            "vision_budget": {"type": int, "metavar": "N", "help": "patches a pack; default: 1.3 x mean demand"},
        },
        folder="packed",
    ),
)

# Least and most of settings that are numbers. A copy's number, epoch x ratio, has 32 bits, a seed has 64.
RANGES = {
    "length": (1, 1 << 24),
    "epoch": (0, 1_000_000),
    "part": (0, 1_000_000),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "vision_budget": (1, (1 << 31) - 1),
}


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raise UserError, before any work, if a setting of a stage is out of its range or not one of its choices.

    where: what stands before a setting's name in the message, "recipe.yaml: " or "--".
    """
    choices = {
        name: kinds["choices"] for stage in STAGES for name, kinds in stage.options.items() if "choices" in kinds
    }
    for name, value in settings.items():
        least, most = RANGES.get(name, (0, 0))
        shown = name.replace("_", "-") if where == "--" else name
        if name in RANGES and value is not None and not least <= value <= most:
            raise UserError(f"{where}{shown} is {value}: give a number from {least} to {most}")
        if name in choices and value not in choices[name]:
            raise UserError(f"{where}{shown} is {value!r}: give {' or '.join(choices[name])}")
