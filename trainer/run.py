"""What a run is made of, read and checked before any process group or model: data, layout, where it starts."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer

from kanyun.errors import UserError
from kanyun.fingerprint import Fingerprint, check_model, fingerprint
from kanyun.storage import Folder
from kanyun.storage.claim import Claim, only_writer
from trainer import checkpoint
from trainer.checkpoint import DamagedError, State
from trainer.checkpoint.reader import load
from trainer.config import TrainConfig
from trainer.data.source import PackedData
from trainer.host_memory import activation_room
from trainer.models.config import ModelConfig
from trainer.models.language import LanguageModel
from trainer.optim.optimizer import learning_rate
from trainer.planning.gpus import find_gpu
from trainer.planning.planner import Layout, LayoutPlanner

RUN = "run.json"  # in the output folder: the config; marks it as a run's
_SCHEDULE = ("lr", "min_lr", "warmup_steps")


@dataclass(frozen=True)
class Run:
    """All that a run is made of."""

    config: TrainConfig
    output: Folder
    model: ModelConfig
    data: PackedData
    validation: PackedData | None
    layout: Layout
    start: State  # step 0, or what the checkpoint says that is resumed
    resume: Folder | None  # that checkpoint
    weights: Folder | None  # at step 0: the checkpoint to take the first weights from
    notes: tuple[str, ...] = ()  # sentences about how the start was chosen
    damaged: Mapping[str, str] = field(default_factory=dict)  # checkpoints passed over for their content: URI -> why

    @classmethod
    def prepare(
        cls, config: TrainConfig, world_size: int, cuda: bool, damaged: Mapping[str, str] | None = None
    ) -> Self:
        """Raises UserError for anything that does not fit together. Writes nothing."""
        tokenizer = fingerprint(Folder(config.model))
        check_model(Folder(config.model))
        model = ModelConfig.from_hf(config.model)
        data = PackedData(config.data, config.length, tokenizer)
        validation = PackedData(config.validation, config.length, tokenizer) if config.validation else None
        _check_image_token(model, [data, *([validation] if validation else [])])
        output, damaged = open_output(config.output), damaged or {}
        fixed = {name: getattr(config, name) for name in ("length", "global_batch", "seed", "trainable")}
        run = {"data digest": data.digest, **fixed}
        start = State(0, 0, 0, tokenizer.digest, asdict(model), run, resume=_name(config.resume))
        resume, notes = _resumed(config, output, damaged)
        weights = None
        if resume is not None:
            state = _state(resume, tokenizer)
            state.require(start, resume.uri)
            start = replace(state, resume=start.resume)
        elif config.continue_from:
            weights, start, passed_over = _continued(config.continue_from, start, tokenizer, damaged)
            notes += passed_over
            notes += (
                f"continuing {weights.path}: its weights and optimizer are kept; the position in the data starts anew "
                "at the first pack, the schedule at step 0",
            )
        elif config.init != "random":
            weights, passed_over = _looked_up(config.init, damaged)
            notes += passed_over
            replace(_state(weights, tokenizer), run={}).require(start, weights.uri)
        gpu = find_gpu(torch.cuda.get_device_name()) if cuda else None
        node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        planner = LayoutPlanner(model, gpu, world_size, node, host_memory=activation_room(node))
        layout = planner.plan(length=config.length, global_batch=config.global_batch, patches=data.vision_budget)
        return cls(config, output, model, data, validation, layout, start, resume, weights, notes, damaged)

    def load(self, model: LanguageModel, optimizer: ChainedOptimizer | None = None) -> Self:
        """Fill model, and optimizer if given, from the checkpoint that the run starts from. Every rank calls it.

        Return the run as it starts from there: where the content of the newest is damaged, an earlier one is taken.
        Raises UserError as `load`, and if none is left, or if the damaged one was chosen by the user.
        """
        source = self.resume or self.weights
        assert source is not None
        try:
            load(source, model, optimizer)
        except DamagedError as error:
            damaged = {**self.damaged, source.uri: str(error)}
            other = self.prepare(self.config, dist.get_world_size(), torch.cuda.is_available(), damaged)
            other.require_agreement()
            return other.load(model, optimizer)
        return self

    def require_agreement(self) -> None:
        """Raises UserError if ranks found different checkpoints, or planned different layouts. Every rank calls it."""
        mine = self.resume.name if self.resume else "no checkpoint", self.layout.reason
        every = [mine] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        names, layouts = map(set, zip(*every, strict=True))
        if len(names) > 1:
            raise UserError(
                f"ranks found different checkpoints in {self.output.path} ({', '.join(sorted(names))}): give an "
                "output on a disk that all nodes share, or on hdfs://"
            )
        if len(layouts) > 1:
            raise UserError(
                f"ranks planned different layouts ({'; or '.join(sorted(layouts))}): use nodes with the same GPUs and "
                "the same host memory"
            )

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return what decides the learning rate of each step."""
        return {"steps": steps, **{name: getattr(self.config, name) for name in _SCHEDULE}}

    def schedule_change(self, steps: int) -> str:
        """Return a sentence if the learning rate does not go on as it would have in the run that was stopped."""
        before, now, step = self.start.schedule, self.schedule(steps), self.start.step
        changed = [f"{name} {before[name]} -> {now[name]}" for name in before if before[name] != now.get(name)]
        if not changed or step >= steps:
            return ""
        old = self.config.model_copy(update={name: before[name] for name in _SCHEDULE})
        last = learning_rate(old, step - 1, before["steps"])
        return (
            f"the schedule changed ({', '.join(changed)}): the learning rate goes from {last:.3e} in step {step} to "
            f"{learning_rate(self.config, step, steps):.3e} in step {step + 1}"
        )


def _check_image_token(model: ModelConfig, packed: Sequence[PackedData]) -> None:
    """Raises UserError if config.json and the packs call different tokens the image's: its patches had no slots."""
    for dataset in (dataset for data in packed for dataset in data.datasets):
        built = dataset.manifest.image_token_id
        if model.vision and built is not None and built != model.image_token_id:
            raise UserError(
                f"config.json of the model has image_token_id {model.image_token_id}, but {dataset.folder.uri} was "
                f"built with <|image_pad|> as {built}, the tokenizer's: correct config.json"
            )


@contextmanager
def claimed(path: str) -> Iterator[Claim]:
    """Make the output folder and claim it for the block. If nothing is written to it, what was made goes again.

    Raises UserError as `open_output`, or if another run writes there.
    """
    output = open_output(path)
    new = [output]
    while not new[-1].exists() and new[-1].parent.path != new[-1].path:
        new.append(new[-1].parent)
    output.make()
    try:
        with ExitStack() as claims:
            claim = claims.enter_context(only_writer(output))
            root = checkpoint.checkpoints_of(output)
            if output.is_local and os.path.islink(root.path):  # another output may link to the same folder
                claims.enter_context(only_writer(root))
            yield claim
    finally:
        for folder in new[:-1]:
            if not folder.names():
                folder.delete()


def open_output(path: str) -> Folder:
    """Return the output folder: a new or empty one, or a run's, which a copy may have made of its checkpoints alone.

    Raises UserError if it holds something else, or its checkpoints cannot be reached.
    """
    output = Folder(path)
    if "checkpoints" in output.names() and not output.is_folder("checkpoints"):
        raise UserError(
            f"{output.path}/checkpoints is no folder, or a link to a disk that is not mounted: mount it, or choose "
            "another output folder"
        )
    names = _contents(output)
    if names == ["checkpoints"] and not _contents(output / "checkpoints"):
        names = []  # made beforehand: a link to a larger disk
    if names and RUN not in names and not checkpoint.steps_of(output)[-1:] > [checkpoint.step_name(0)]:
        raise UserError(f"{output.path} holds something else ({names[0]}): choose an empty or new output folder")
    return output


def _contents(folder: Folder) -> list[str]:
    """Return the names in a folder, without those of claims and a filesystem's own."""
    return [name for name in folder.names() if not name.startswith((".", "_writer-", "lost+found"))]


def _resumed(config: TrainConfig, output: Folder, damaged: Mapping[str, str]) -> tuple[Folder | None, tuple[str, ...]]:
    """Return the checkpoint to resume, if any, and sentences about the choice."""
    search = checkpoint.find(output, damaged)
    if config.resume is None:
        if search.newest is None and search.passed_over:
            raise UserError(
                f"no checkpoint of {output.path} is whole ({'; '.join(search.passed_over)}): restore one, give "
                "`resume: FOLDER`, or start in a new output folder"
            )
        return search.newest, tuple(search.sentences)
    wanted = _name(config.resume)
    if search.newest is not None and checkpoint.read_state(search.newest).resume == wanted:
        made_since = f"{search.newest.name} was made since `resume: {wanted}` and is taken"
        return search.newest, (*search.passed_over, made_since)
    if (number := wanted.removeprefix("step_")).isdecimal():
        chosen = checkpoint.checkpoints_of(output) / checkpoint.step_name(int(number))
        if not chosen.exists():
            there = ", ".join(checkpoint.steps_of(output)) or "none"
            raise UserError(
                f"{output.path} has no checkpoint of step {int(number)}: set `resume` to one that is there ({there})"
            )
        checkpoint.require_whole(chosen)
    else:
        chosen = checkpoint.resolve(wanted)
    if chosen.uri in damaged:
        raise UserError(f"{damaged[chosen.uri]}; `resume: {wanted}` chose it")
    return chosen, (f"`resume: {wanted}` chose {chosen.path}",)


def _looked_up(path: str, damaged: Mapping[str, str]) -> tuple[Folder, tuple[str, ...]]:
    """Return the checkpoint that `path` stands for, and a sentence for each newer one that was passed over."""
    lookup = checkpoint.look_up(path, damaged)
    assert lookup.newest is not None
    if lookup.newest.uri in damaged:
        raise UserError(damaged[lookup.newest.uri])
    return lookup.newest, tuple(lookup.passed_over)


def _continued(
    path: str, start: State, tokenizer: Fingerprint, damaged: Mapping[str, str]
) -> tuple[Folder, State, tuple[str, ...]]:
    """Return the checkpoint, the state at step 0 of a run that keeps its optimizer, and sentences about the choice.

    Raises UserError if model, tokenizer or the trained parts differ: its moments are of other weights.
    """
    source, passed_over = _looked_up(path, damaged)
    state = _state(source, tokenizer)
    if not state.run:
        raise UserError(f"{source.uri} is a converted model without an optimizer: use it as `init`")
    replace(state, run={"trainable": state.run.get("trainable")}).require(start, source.uri)
    return source, replace(start, updates_before=state.updates), passed_over


def _state(step: Folder, tokenizer: Fingerprint) -> State:
    """Return a checkpoint's state; a digest that `tokenizer` had by a former algorithm is replaced by today's."""
    state = checkpoint.read_state(step)
    return replace(state, fingerprint=tokenizer.digest) if tokenizer.is_of(state.fingerprint, step / "hf") else state


def _name(resume: int | str | None) -> str:
    return "" if resume is None else str(resume)
