"""What a run is: what a person decides. Everything about speed is decided by planning/planner.py."""

import difflib
from typing import Any, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from yaml import YAMLError

from kanyun.errors import UserError
from kanyun.storage import Folder


class TrainConfig(BaseModel):
    """A training run. Paths may be local, on a disk that all nodes share, or hdfs:// URIs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: str  # Hugging Face folder: config, tokenizer, processor settings; its weights are not read
    init: str = "random"  # or a checkpoint to take the first weights from, as `python -m convert to-megatron` makes it
    continue_from: str | None = None  # a run whose weights and optimizer to keep, with other data, batch or schedule
    resume: int | str | None = None  # step (or a checkpoint's folder) to resume instead of the newest whole one
    data: str  # parent of packed folders
    validation: str | None = None  # the same for held-out data
    output: str
    length: PositiveInt  # token slots a pack; the data must have been packed to it
    global_batch: PositiveInt  # packs a step
    steps: PositiveInt | None = None  # this, or epochs
    epochs: PositiveInt | None = None
    lr: float = Field(gt=0)  # after linear warmup
    min_lr: float = Field(default=0.0, ge=0)  # at the end of the cosine decay
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)  # of matrices; norms and biases have none
    clip_grad: float = Field(default=1.0, gt=0)  # largest norm of the whole gradient
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    seed: int = Field(default=0, ge=0)  # of random weights and of the order of the data
    deterministic: bool = False  # on a GPU: the same run has the same bits, also resumed; 1.5B is 22 % slower
    trainable: str = "all"  # or language, vision, merger, joined by "+"
    save_every: PositiveInt = 500  # steps; the last one is always saved
    keep_last: PositiveInt = 2  # checkpoints
    validate_every: PositiveInt = 500  # steps; also after the last one
    hang_after: PositiveInt = 600  # seconds without progress after which a run of several ranks ends, naming who hangs

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give steps or epochs, one of them: steps is {self.steps}, epochs is {self.epochs}")
        if self.continue_from and self.init != "random":
            raise ValueError(f"give init or continue_from, not both: init is {self.init}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}: the schedule falls from lr to min_lr")
        if self.adam_beta2 > 0.99:
            raise ValueError(
                f"adam_beta2 is {self.adam_beta2}: moments are bfloat16 on a GPU, where one that falls by less than "
                "1 % a step may be rounded back to what it was; use 0.99 or less"
            )
        return self


def load_config(path: str, changes: list[str]) -> TrainConfig:
    """Read the config of a YAML file, with `key=value` changes on top.

    Raises UserError, one sentence for each thing that is wrong.
    """
    file = Folder(path)
    if not file.exists():
        raise UserError(f"there is no config {path}: give a YAML file, for example one of jobs/recipes/")
    try:
        text = file.parent.read(file.name).decode()
        # OmegaConf reads 1e-4 as a number (plain YAML says it is text), and so it is the same in both places.
        merged = OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist(changes))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())  # YAML's errors have several lines
        raise UserError(f"{path} is not a YAML file of `key: value` lines ({reason}): correct it") from error
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(problem) for problem in error.errors())) from error


def _sentence(problem: Any) -> str:
    """Say one of pydantic's problems for people."""
    key, kind = ".".join(str(part) for part in problem["loc"]), problem["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, TrainConfig.model_fields, n=1, cutoff=0)[0]
        return f"unknown key {key!r} in the config: did you mean {near!r}?"
    if kind == "missing":
        return f"the config has no {key}: add `{key}: ...`"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    message = problem["msg"].replace("Input should", "it should")
    return f"{key or 'the config'} is {problem['input']!r}: {message}"
