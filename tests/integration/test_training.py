"""Training on packed data, whole: the gradient, the curve, stopping and going on, and what users do wrong."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from kanyun.errors import UserError
from kanyun.naming import dataset_name
from tests.support.processes import run_python
from tests.support.training_job import (
    LENGTH,
    command,
    curve,
    environment,
    execute,
    launch,
    metrics_of,
    start,
    train,
    wait_for,
    write_job,
)
from trainer import checkpoint
from trainer.checkpoint.reader import load
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.models.initialize import build_model
from trainer.optim.optimizer import learning_rate
from trainer.runtime import Runtime
from trainer.trainer import BAD_STEPS, Run, Trainer

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_job(tmp_path_factory.mktemp("vl"), images=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_job(tmp_path_factory.mktemp("text"), images=False)


@pytest.fixture(scope="module")
def whole(vl: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of images and text in this process, never stopped."""
    values = vl | {"output": str(tmp_path_factory.mktemp("whole") / "out")}
    train(values)
    return values


def weights(values: dict[str, Any]) -> Weights:
    """Return the weights of the latest checkpoint."""
    run = Run.prepare(TrainConfig(**values), world_size=1, cuda=False)
    assert run.resume is not None
    with Runtime.start() as runtime:
        model = build_model(run.model, runtime)
        load(run.resume, model)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class StopAt(Trainer):
    """Stops like a killed process, right after it saved."""

    stop = 3

    def save(self) -> None:
        super().save()
        if self.step == self.stop:
            raise KeyboardInterrupt


def train_and_stop(values: dict[str, Any]) -> None:
    run = Run.prepare(TrainConfig(**values), world_size=1, cuda=False)
    with Runtime.start(seed=run.config.seed) as runtime, StopAt(run, runtime) as trainer:
        trainer.train()


def test_stopped_and_resumed_is_never_stopped(whole: dict[str, Any], tmp_path: Path) -> None:
    values = whole | {"output": str(tmp_path / "out")}
    with pytest.raises(KeyboardInterrupt):
        train_and_stop(values)
    assert len(curve(values)) == 3
    train(values)
    for name in ("loss", "grad_norm", "lr", "validation_loss", "trained_tokens"):
        assert curve(values, name) == curve(whole, name), name
    assert_equal(weights(values), weights(whole))


def test_two_processes_train_as_one_and_as_plain_torch(whole: dict[str, Any], tmp_path: Path) -> None:
    two = whole | {"output": str(tmp_path / "out")}
    done = execute(two, processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 CPU process(es)" in done.stdout
    assert re.search(r"^first step done \d+ s after this process was started$", done.stdout, re.MULTILINE)
    for name in ("loss", "grad_norm"):
        assert curve(two, name) == pytest.approx(curve(whole, name), rel=1e-3), name
    assert curve(two)[0] == pytest.approx(curve(whole)[0], rel=1e-6)
    assert metrics_of(two)[-1]["validation_loss"] == pytest.approx(metrics_of(whole)[-1]["validation_loss"], rel=1e-3)

    plain, losses = in_plain_torch(TrainConfig(**whole))
    assert losses == pytest.approx(curve(whole), rel=1e-5)
    found = weights(whole)
    assert max((found[name] - weight).abs().max().item() for name, weight in plain.items()) < 1e-4

    longer = {"steps": 8}
    train(two | longer)  # a checkpoint of two processes goes on in one
    assert curve(two)[6:] == pytest.approx(straight_on(whole, tmp_path, longer)[6:], rel=1e-3)


def straight_on(values: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> list[float]:
    """The curve of a copy of a run that goes on with other settings."""
    subprocess.run(["cp", "-r", values["output"], str(tmp_path / "copy")], check=True)
    train(values | changes | {"output": str(tmp_path / "copy")})
    return curve(values | {"output": str(tmp_path / "copy")})


def in_plain_torch(config: TrainConfig) -> tuple[Weights, list[float]]:
    """The same training in torch alone: one loss over all packs of a step, torch's AdamW and clipping."""
    run = Run.prepare(config, world_size=1, cuda=False)
    losses: list[float] = []
    with Runtime.start(seed=config.seed) as runtime, Trainer(run, runtime) as trainer:
        batches = list(islice(trainer.stream.batches(0), config.steps))
        model = build_model(run.model, runtime)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        assert config.weight_decay > 0.05  # or it would prove little
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
        )
        for step, packs in enumerate(batches):
            assert unequal(packs)
            optimizer.zero_grad()
            sums = [model(pack) for pack in packs]
            tokens = sum(pack.loss_mask.sum() for pack in packs)
            loss = torch.stack(sums).sum() / tokens
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, len(batches))
            optimizer.step()
            losses.append(loss.item())
        return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


def unequal(packs: tuple[Batch, ...]) -> bool:
    """Packs of one step have unequal numbers of trained tokens, so that a mean of means would show."""
    counts = [pack.loss_mask.sum().item() for pack in packs]
    return max(counts) > 1.2 * min(counts)


def test_killed_at_any_moment_goes_on_from_the_last_save(whole: dict[str, Any], tmp_path: Path) -> None:
    values = whole | {"output": str(tmp_path / "out"), "save_every": 1, "validate_every": 3}
    for at_step in (2, 4):
        with start(values) as process:
            wait_for(Path(values["output"], "checkpoints", f".attempt-step_{at_step:08d}"), process)
            process.kill()  # while a checkpoint is being written
        assert checkpoint.read_state(checkpoint.resolve(values["output"])).step in (at_step - 1, at_step)
    done = launch(values)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    assert curve(values) == curve(whole)
    assert_equal(weights(values), weights(whole))
    left = Path(values["output"], "checkpoints")
    assert sorted(path.name for path in left.iterdir()) == ["latest", "step_00000005", "step_00000006"]


@pytest.mark.parametrize("images", [False, True], ids=["text", "vl"])
def test_learns_by_heart(images: bool, tmp_path: Path) -> None:
    """Four packs of noise, all of them in each step: only memory lowers the loss."""
    values = write_job(tmp_path, images=images, packs=4) | {"steps": 30, "lr": 1e-2}
    values |= {"validation": None, "save_every": 100}
    losses = [line["loss"] for line in train(values)]
    assert losses[0] == pytest.approx(math.log(904), rel=0.05)  # knows nothing
    assert losses[-1] < 0.3 * losses[0]


def test_validation_does_not_train_and_frozen_parts_do_not_move(vl: dict[str, Any], tmp_path: Path) -> None:
    base = vl | {"steps": 3, "trainable": "merger", "weight_decay": 0.5}
    often = base | {"output": str(tmp_path / "often"), "validate_every": 1}
    never = base | {"output": str(tmp_path / "never"), "validation": None}
    assert all(line["validation_loss"] for line in train(often))
    assert not any(line["validation_loss"] for line in train(never))
    after = weights(often)
    assert_equal(after, weights(never))
    with Runtime.start(seed=0) as runtime:
        before = build_model(Run.prepare(TrainConfig(**often), 1, False).model, runtime)
        for name, weight in before.named_parameters():
            assert torch.equal(weight, after[name]) != name.startswith("vision.merger."), name


def test_begins_with_the_weights_of_a_checkpoint(whole: dict[str, Any], tmp_path: Path) -> None:
    values = whole | {"output": str(tmp_path / "out"), "init": whole["output"], "steps": 1, "seed": 5, "lr": 1e-12}
    assert train(values)[-1]["validation_loss"] == pytest.approx(metrics_of(whole)[-1]["validation_loss"], rel=1e-6)


def test_an_infinite_gradient_skips_the_step_and_many_stop_the_run(text: dict[str, Any], tmp_path: Path) -> None:
    values = text | {"output": str(tmp_path / "out"), "steps": 20, "save_every": 20}
    run = Run.prepare(TrainConfig(**values), world_size=1, cuda=False)
    with Runtime.start() as runtime, Trainer(run, runtime) as trainer:
        norm_weight = trainer.model.get_parameter("language.decoder.final_layernorm.weight")
        norm_weight.data[3] = math.inf
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        with pytest.raises(
            UserError, match=f"final_layernorm.weight has 1 of 64 .*: the gradient was nan in {BAD_STEPS} "
        ):
            trainer.train()
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, before[name]), name
    lines = metrics_of(values)
    assert [line["skipped"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[0]["grad_norm"] is None


@pytest.mark.parametrize(
    ("save_every", "problem"), [(20, "loss of the last step, 4, is nan"), (2, "gradient of step 2")]
)
def test_weights_that_are_not_finite_are_no_success_and_no_checkpoint(
    save_every: int, problem: str, text: dict[str, Any], tmp_path: Path
) -> None:
    """A checkpoint of them would take the place of a good one."""
    values = text | {"output": str(tmp_path / "out"), "steps": BAD_STEPS - 1, "save_every": save_every}
    run = Run.prepare(TrainConfig(**values), world_size=1, cuda=False)
    with Runtime.start() as runtime, Trainer(run, runtime) as trainer:
        trainer.model.get_parameter("language.decoder.final_layernorm.weight").data[3] = math.inf
        with pytest.raises(UserError, match=rf"final_layernorm.weight has 1 of 64 .*: the {problem}"):
            trainer.train()
    assert checkpoint.steps_of(run.output) == []


def test_finished_work_is_not_done_again(whole: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(whole["output"], "metrics.jsonl").read_bytes()
    train(whole)
    assert "is finished: 6 steps" in capsys.readouterr().out
    assert Path(whole["output"], "metrics.jsonl").read_bytes() == before


def of_few_tokens(model: Path) -> Path:
    """Return a copy of a model's folder whose tokenizer has more tokens than config.json says."""
    folder = shutil.copytree(model, model.with_name("few"))
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)["vocab_size"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusals(whole: dict[str, Any], text: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    yield {"length": 128}, "packed to length 64, but the config has length: 128"
    yield (
        {"data": text["data"]},
        "built for a model with no image processor, but the model folder has an image",
    )
    yield {"data": whole["model"]}, "no packed dataset"
    yield {"model": whole["data"]}, "no tokenizer.json"
    yield (
        {"model": str(of_few_tokens(Path(whole["model"])))},
        "has id .*, but config.json has vocab_size 99, so the model",
    )
    yield {"output": whole["model"]}, "holds something else"
    yield {"seed": 1}, "made with seed 0, this run has 1"
    yield {"global_batch": 8}, "made with global_batch 4, this run has 8"
    yield {"trainable": "merger"}, "made with trainable all, this run has merger"
    yield {"output": whole["output"] + "-new", "init": whole["data"]}, "is no checkpoint"
    yield {"output": whole["output"] + "-new", "init": text["output"]}, "made with tokenizer fingerprint"


def test_what_does_not_fit_is_refused_with_both_values(whole: dict[str, Any], text: dict[str, Any]) -> None:
    train(text)
    for changes, message in refusals(whole, text):
        with pytest.raises(UserError, match=message):
            Run.prepare(TrainConfig(**whole | changes), world_size=1, cuda=False)


def test_an_output_that_cannot_be_written_is_said_so(text: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot (read|write) .*Not a directory"):
        train(text | {"output": str(tmp_path / "file" / "out")})


def test_the_command_line_says_one_sentence(text: dict[str, Any], tmp_path: Path) -> None:
    values = text | {"output": str(tmp_path / "out")}
    done = execute(values, "lenght=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'lenght' in the config: did you mean 'length'?\n"

    unfinished = tmp_path / "data" / dataset_name(LENGTH, 0, 0)
    unfinished.mkdir(parents=True)
    done = launch(values, f"data={tmp_path / 'data'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "has no manifest.json" in done.stderr
    assert done.stderr.count("\n") == 1

    # Wrong input stays wrong: nothing is started again.
    done = run_python(command(values, "lenght=3", processes=2), environment(RESTARTS="1"))
    assert done.returncode == 2
    last = "error: unknown key 'lenght' in the config: did you mean 'length'?"
    assert done.stderr.splitlines()[-1] == last  # after all that torchrun has to say
    assert done.stderr.count(last) == 2  # and once where it was seen: of two ranks one says it
    assert "Traceback" not in done.stderr
    assert not Path(values["output"]).exists()  # what was refused leaves nothing


def test_metrics_are_there_for_people_and_programs(whole: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(whole["output"], "tensorboard"))).Reload()
    assert [event.value for event in events.Scalars("loss/train")] == pytest.approx(curve(whole), rel=1e-6)
    assert [event.step for event in events.Scalars("loss/held-out")] == [3, 6]
    for line in metrics_of(whole):
        assert line["mfu"] is None  # no GPU
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(4 * useful_tokens(whole), rel=1e-6)
        assert 0 <= line["data_wait"] <= 1
        assert line["imbalance"] == 1  # one rank
    state = checkpoint.read_state(checkpoint.resolve(whole["output"]))
    assert (state.step, state.consumed, state.skipped) == (6, 24, 0)
    assert json.loads(Path(whole["output"], "run.json").read_text())["lr"] == whole["lr"]


def useful_tokens(values: dict[str, Any]) -> float:
    """Return the useful tokens of a pack, on average."""
    manifest = json.loads(Path(values["data"], dataset_name(LENGTH, 0, 0), "manifest.json").read_text())
    return float(manifest["tokens"] / manifest["packs"])
