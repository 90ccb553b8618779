"""`continue_from`: another batch, schedule or data, with the weights and the optimizer of a run before."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kanyun.errors import UserError
from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from tests.support.packed_data import random_packs, write_packed
from tests.support.training_job import (
    LENGTH,
    WHOLE_STEPS,
    launch,
    metrics_of,
    train,
)
from trainer import checkpoint
from trainer.checkpoint.metadata import read_metadata
from trainer.config import TrainConfig
from trainer.trainer import Run


def test_a_run_continues_with_another_batch_and_schedule_and_keeps_its_optimizer(
    text_run: dict[str, Any], job: dict[str, Any]
) -> None:
    changes = {
        "continue_from": text_run["output"],
        "global_batch": 8,
        "steps": 3,
        "lr": 1e-3,
        "warmup_steps": 0,
        "seed": 5,
    }
    done = launch(job | changes)
    assert done.returncode == 0, done.stderr
    assert "the position in the data starts anew" in done.stdout
    lines = metrics_of(job)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["lr"] == 1e-3
    state = checkpoint.read_state(checkpoint.resolve(job["output"]))
    assert (state.updates_before, state.updates, state.consumed) == (WHOLE_STEPS, WHOLE_STEPS + 3, 24)
    before, after = (optimizer_of(values) for values in (text_run, job))
    assert before.keys() == after.keys()
    # exp_avg_sq decays by 0.95 a step: without the kept one, it would be about 0.05 of the gradients' squares.
    fresh = json.loads(json.dumps(job | changes | {"continue_from": None, "init": text_run["output"]}))
    train(fresh | {"output": job["output"] + "-fresh"})
    unkept = optimizer_of(fresh | {"output": job["output"] + "-fresh"})
    moments = [name for name in after if ".exp_avg_sq." in name]
    assert sum(after[name] for name in moments) > 1.5 * sum(unkept[name] for name in moments)
    with pytest.raises(UserError, match="made with trainable all, this run has language"):
        Run.prepare(TrainConfig(**job | changes | {"output": job["output"] + "-2", "trainable": "language"}), 1, False)


@pytest.mark.parametrize("change", ["other ratios", "another folder"])
def test_a_run_continues_on_other_data_from_its_first_pack(
    change: str, text_run: dict[str, Any], job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, tokenizer = tmp_path / "data", fingerprint(Folder(job["model"])).digest
    shutil.copytree(job["data"], data)
    new = random_packs(3, 8, LENGTH, images=False)
    if change == "another folder":
        write_packed(data, new, LENGTH, part=1, tokenizer=tokenizer)
    else:
        shutil.rmtree(data)
        write_packed(data, new, LENGTH, tokenizer=tokenizer, ratios={"made": "0.5"})
    other = job | {"data": str(data)}
    shutil.copytree(text_run["output"], job["output"])
    with pytest.raises(UserError, match=r"made with data digest .* or keep weights and optimizer in another output"):
        Run.prepare(TrainConfig(**other), world_size=1, cuda=False)
    other |= {"continue_from": text_run["output"], "output": str(tmp_path / "on"), "steps": 2, "warmup_steps": 0}
    train(other)
    assert "its weights and optimizer are kept; the position in the data starts anew" in capsys.readouterr().out
    state = checkpoint.read_state(checkpoint.resolve(other["output"]))
    assert (state.step, state.updates_before, state.updates, state.consumed) == (2, WHOLE_STEPS, WHOLE_STEPS + 2, 8)
    # `init` takes the same weights, so that the first loss is the same, but no moments: the second one is not.
    unkept = train(other | {"continue_from": None, "init": text_run["output"], "output": str(tmp_path / "unkept")})
    kept = metrics_of(other)
    assert kept[0]["loss"] == unkept[0]["loss"]
    assert kept[1]["loss"] != unkept[1]["loss"]


def optimizer_of(values: dict[str, Any]) -> dict[str, float]:
    """Return the sums of the optimizer's tensors in the newest checkpoint, by name."""
    step = checkpoint.resolve(values["output"])
    sums: dict[str, float] = {}
    for record in read_metadata(step):
        if record.key.startswith("optimizer."):
            data = step.read(record.file, record.offset, record.size)
            value = float(torch.load(io.BytesIO(data), weights_only=True).double().sum())
            sums[record.key] = sums.get(record.key, 0.0) + value
    return sums
