"""The five stages in their order: the command line, the recipe and the page of the row flow are made from this table.

Classes are named, not imported: `--help` and a mistyped option answer at once, without Spark.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

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
