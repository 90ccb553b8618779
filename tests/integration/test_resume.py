"""A run that goes on: from which step, with how many ranks, at what learning rate."""

import json
import random
import re
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.to_hf import to_hf
from kanyun.errors import UserError
from tests.support.processes import run_ranks
from tests.support.qwen_assets import tiny_text_folder
from tests.support.training_job import (
    WHOLE_STEPS,
    command,
    copy_of,
    curve,
    launch,
    start,
    steps_of,
    train,
    wait_for,
    write_job,
)
from trainer.config import TrainConfig
from trainer.trainer import Run

NOTING = "tests/support/noting_trainer.py"


def test_a_refused_command_leaves_no_output_folder(job: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "new" / "runs" / "x"
    for change in ("data=/nowhere", "trainable=nothing"):
        done = launch(job, f"output={output}", change)
        assert done.returncode == 2, done.stderr
        assert not (tmp_path / "new").exists()
    output.mkdir(parents=True)
    launch(job, f"output={output}", "data=/nowhere")
    assert list(output.iterdir()) == []


def test_a_clock_that_jumps_changes_nothing(
    text_run: dict[str, Any], job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, clock = random.Random(1), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + draw.uniform(-1e6, 1e6))  # 12 days
    train(job | {"steps": WHOLE_STEPS - 3})
    assert steps_of(job) == [f"step_{step:08d}" for step in (2, 4, 5)]
    train(job)
    assert curve(job, "trained_tokens") == curve(text_run, "trained_tokens")
    assert curve(job)[-1] == pytest.approx(curve(text_run)[-1], rel=0.05)  # the schedule was another one up to step 5
    assert all(0 < seconds < 1000 for seconds in curve(job, "seconds"))


def test_resume_chooses_a_step_once(text_run: dict[str, Any], job: dict[str, Any]) -> None:
    root = copy_of(text_run, job)
    chosen = Run.prepare(TrainConfig(**job | {"resume": 4}), world_size=1, cuda=False)
    assert (chosen.start.step, chosen.resume and chosen.resume.name) == (4, "step_00000004")
    with start(job, "resume=4") as process:
        wait_for(root / ".attempt-step_00000006", process)
        process.kill()
    again = Run.prepare(TrainConfig(**job | {"resume": 4}), world_size=1, cuda=False)  # the same command, after a kill
    assert again.start.step in (4, 6)
    train(job | {"resume": 4})
    assert Run.prepare(TrainConfig(**job | {"resume": 4}), world_size=1, cuda=False).start.step == WHOLE_STEPS
    assert curve(job) == curve(text_run)
    (aside,) = root.glob("aside-*")
    elsewhere = Run.prepare(TrainConfig(**job | {"resume": str(aside / "step_00000006")}), world_size=1, cuda=False)
    assert elsewhere.start.step == 6
    for form in (5, "step_00000005"):
        with pytest.raises(UserError, match=r"out has no checkpoint of step 5: .* \(step_0000000\d, .*_00000008\)"):
            Run.prepare(TrainConfig(**job | {"resume": form}), world_size=1, cuda=False)


def test_more_steps_say_what_becomes_of_the_learning_rate(text_run: dict[str, Any], job: dict[str, Any]) -> None:
    copy_of(text_run, job)
    longer = TrainConfig(**job | {"steps": 2 * WHOLE_STEPS})
    sentence = Run.prepare(longer, world_size=1, cuda=False).schedule_change(2 * WHOLE_STEPS)
    assert sentence.startswith(
        f"the schedule changed (steps {WHOLE_STEPS} -> {2 * WHOLE_STEPS}): the learning rate goes from "
    )
    last, following = (float(value) for value in re.findall(r"(\d\.\d+e-\d+) in step", sentence))
    assert last == pytest.approx(curve(text_run, "lr")[-1], rel=1e-3)
    assert following > 8 * last
    assert Run.prepare(TrainConfig(**job), world_size=1, cuda=False).schedule_change(WHOLE_STEPS) == ""


def test_any_number_of_ranks_goes_on_with_the_same_samples(
    text_run: dict[str, Any], job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved at 1, loaded at 2; saved at 2, loaded at 4; saved at 4, loaded at 1."""
    values, steps = job | {"validation": None, "save_every": 100}, []
    for ranks, upto in ((1, 2), (2, 4), (4, 6), (1, 8)):
        notes = tmp_path / f"{ranks}-{upto}"
        notes.mkdir()
        monkeypatch.setenv("NOTES", str(notes))
        run_ranks(ranks, NOTING, *command(values, f"steps={upto}")[1:])
        steps += samples(notes, ranks, 2)
    monkeypatch.setenv("NOTES", str(tmp_path))
    alone = values | {"output": str(tmp_path / "alone")}
    run_ranks(1, NOTING, *command(alone)[1:])
    undisturbed = samples(tmp_path, 1, WHOLE_STEPS)
    assert steps == undisturbed
    assert len({tuple(step) for step in steps}) == WHOLE_STEPS
    assert all(len(step) >= 4 for step in steps)


def test_a_save_of_eight_ranks_is_converted_and_goes_on_with_1_2_and_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the eight share the layers, whose gradients and those of the rest are exchanged in several buckets."""
    values = write_job(tmp_path, images=False, packs=32, make_model=partial(tiny_text_folder, layers=5))
    values |= {"global_batch": 8, "steps": 4, "save_every": 2, "validation": None}
    alone = values | {"output": str(tmp_path / "alone")}
    noted = noted_run(1, alone, tmp_path / "notes-alone", monkeypatch)
    eight = json.dumps(values | {"steps": 2})
    run_ranks(8, "-m", "tests.support.two_processes", eight, json.dumps({"weight_shards": 2}), "as it is")
    saved = Path(values["output"], "checkpoints/step_00000002")
    assert {file.name.split("_")[2] for file in saved.glob("*.distcp")} == {str(rank) for rank in range(8)}

    to_hf(str(saved), tmp_path / "of-eight")
    to_hf(str(Path(alone["output"], "checkpoints/step_00000002")), tmp_path / "of-one")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("of-eight", "of-one"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-4), name

    for ranks in (1, 2, 4):
        again = values | {"output": str(tmp_path / f"again-{ranks}")}
        shutil.copytree(values["output"], again["output"])
        assert noted_run(ranks, again, tmp_path / f"notes-{ranks}", monkeypatch)[:2] == noted[2:]
        assert curve(again)[2:] == pytest.approx(curve(alone)[2:], rel=1e-4)


def noted_run(ranks: int, values: dict[str, Any], notes: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Train with `ranks` ranks; return the sample ids of each step."""
    notes.mkdir()
    monkeypatch.setenv("NOTES", str(notes))
    run_ranks(ranks, NOTING, *command(values)[1:])
    lines = (notes / "rank-0.txt").read_text().splitlines()
    return samples(notes, ranks, len(lines) * ranks // values["global_batch"], values["global_batch"])


def samples(notes: Path, ranks: int, steps: int, batch: int = 4) -> list[list[int]]:
    """The sorted sample ids of each of the first `steps`, over the ranks' micro-batches of one pack, `batch` a step."""
    each = batch // ranks
    lines = [(notes / f"rank-{rank}.txt").read_text().splitlines() for rank in range(ranks)]
    return [
        sorted(int(word) for rank in lines for line in rank[step * each : (step + 1) * each] for word in line.split())
        for step in range(steps)
    ]
