"""Which checkpoint a run goes on from, and with what: damaged saves, other ranks, other settings, another run's."""

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.hf_writer import HFWriter
from convert.to_hf import to_hf
from kanyun.errors import UserError
from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from tests.support.packed_data import random_packs, write_packed
from tests.support.processes import run_ranks
from tests.support.qwen_assets import tiny_text_folder
from tests.support.training_job import (
    LENGTH,
    WHOLE_STEPS,
    command,
    copy_of,
    curve,
    launch,
    metrics_of,
    start,
    steps_of,
    train,
    wait_for,
    write_job,
)
from trainer import checkpoint
from trainer.checkpoint.metadata import read_metadata
from trainer.config import TrainConfig
from trainer.trainer import Run

NOTING = "tests/support/noting_trainer.py"


def test_the_newest_whole_checkpoint_is_taken_and_nothing_is_lost(
    text_run: dict[str, Any], job: dict[str, Any]
) -> None:
    root = copy_of(text_run, job)
    assert steps_of(job) == [f"step_{step:08d}" for step in (2, 4, 6, 8)]
    (root / "latest").unlink()
    (root.parent / "run.json").unlink()
    (root / "step_00000008" / "state.json").unlink()
    tensors = root / "step_00000006" / "__0_1.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    done = launch(job)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^passed over step_00000008: .* has no state.json", done.stdout, re.MULTILINE)
    assert re.search(r"^passed over step_00000006: .*__0_1.distcp has .* bytes instead of", done.stdout, re.MULTILINE)
    assert re.search("latest is missing; step_00000004 is the newest whole checkpoint", done.stdout)
    assert "step_00000006, step_00000008: newer than step 4, moved to" in done.stdout
    assert "4 line(s) of steps after 4 moved from metrics.jsonl to metrics.aside.jsonl" in done.stdout
    assert curve(job) == curve(text_run)
    (aside,) = root.glob("aside-*")
    assert sorted(path.name for path in aside.iterdir()) == ["step_00000006", "step_00000008"]
    assert len(Path(job["output"], "metrics.aside.jsonl").read_text().splitlines()) == 4


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_newest_checkpoint_with_a_flipped_byte_is_passed_over(
    text_run: dict[str, Any], job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(text_run, job)
    flip_a_byte(root / "step_00000008" / "__0_1.distcp")
    flip_a_byte(root / "step_00000006" / "__0_0.distcp")
    train(job)
    said = capsys.readouterr().out
    for name in ("step_00000008/__0_1.distcp", "step_00000006/__0_0.distcp"):
        assert re.search(rf"^passed over step_0000000\d: .*{name} is damaged \(its digest is ", said, re.MULTILINE)
    assert f"going on from {root}/step_00000004" in said
    assert "step_00000006, step_00000008: newer than step 4, moved to" in said
    assert curve(job) == curve(text_run)

    # One that was asked for by its name is refused, and a run whose content is all damaged does not start anew.
    for name in ("step_00000004", "step_00000006", "step_00000008"):
        flip_a_byte(root / name / "__0_1.distcp")
    with pytest.raises(UserError, match=r"step_00000006/__0_1.distcp is damaged .*; `resume: 6` chose it"):
        train(job | {"resume": 6})
    before = metrics_of(job)
    flip_a_byte(root / "step_00000002" / "__0_1.distcp")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole \(passed over step_00000008: .*is damaged"):
        train(job)
    assert metrics_of(job) == before


def test_conversion_takes_the_newest_checkpoint_without_damage_and_says_so(
    text_run: dict[str, Any], job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(text_run, job)
    flip_a_byte(root / "step_00000008" / "__0_0.distcp")
    flip_a_byte(root / "step_00000006" / "hf" / "config.json")
    flip_a_byte(root / "step_00000004" / "__0_2.distcp")  # the optimizer's: not read
    to_hf(job["output"], tmp_path / "a")
    said = capsys.readouterr().out
    assert re.search(r"^passed over step_00000008: .*__0_0.distcp is damaged", said, re.MULTILINE)
    assert re.search(r"^passed over step_00000006: .*hf/config.json is damaged", said, re.MULTILINE)
    to_hf(str(root / "step_00000004"), tmp_path / "b")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"step_00000006/hf/config.json is damaged"):
        to_hf(str(root / "step_00000006"), tmp_path / "c")


def test_a_checkpoint_that_a_run_deletes_while_it_is_converted(
    text_run: dict[str, Any], job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run with `keep_last: 1` does at its next save. What is whole then is converted."""
    root, add = copy_of(text_run, job), HFWriter.add

    def deleted_before(writer: HFWriter, name: str, tensor: torch.Tensor) -> None:
        shutil.rmtree(root / "step_00000008", ignore_errors=True)
        add(writer, name, tensor)

    monkeypatch.setattr(HFWriter, "add", deleted_before)
    to_hf(job["output"], tmp_path / "a")
    to_hf(str(root / "step_00000006"), tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    monkeypatch.setattr(HFWriter, "add", lambda *arguments: shutil.rmtree(root / "step_00000006", ignore_errors=True))
    with pytest.raises(UserError, match=r"step_00000006/__0_0.distcp cannot be read \(No such file or directory\)"):
        to_hf(str(root / "step_00000006"), tmp_path / "c")


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/nowhere/disk"), Path.touch])
def test_checkpoints_that_cannot_be_reached_are_no_start_at_step_0(
    make: Callable[[Path], None], text_run: dict[str, Any], job: dict[str, Any]
) -> None:
    root = copy_of(text_run, job)
    shutil.rmtree(root)
    make(root)
    before = metrics_of(job)
    with pytest.raises(UserError, match="out/checkpoints is no folder, or a link to a disk that is not mounted"):
        Run.prepare(TrainConfig(**job), world_size=1, cuda=False)
    assert metrics_of(job) == before


@pytest.mark.parametrize("key", ["init", "continue_from"])
def test_another_run_s_newest_checkpoint_with_a_flipped_byte_is_passed_over(
    key: str, text_run: dict[str, Any], job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(text_run["output"], tmp_path / "source")
    newest = tmp_path / "source" / "checkpoints" / "step_00000008"
    flip_a_byte(newest / "__0_0.distcp")
    train(job | {key: str(tmp_path / "source"), "steps": 1, "warmup_steps": 0})
    assert re.search(r"^passed over step_00000008: .* is damaged", capsys.readouterr().out, re.MULTILINE)
    flip_a_byte(newest / "__0_0.distcp")
    earlier = job | {key: str(newest.with_name("step_00000006")), "output": job["output"] + "-2"}
    assert train(earlier | {"steps": 1, "warmup_steps": 0})[0]["loss"] == metrics_of(job)[0]["loss"]
    flip_a_byte(newest / "__0_0.distcp")
    with pytest.raises(UserError, match=r"step_00000008/__0_0.distcp is damaged"):
        train(job | {key: str(newest), "output": job["output"] + "-3"})


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


def test_no_whole_checkpoint_is_no_start_at_step_0(text_run: dict[str, Any], job: dict[str, Any]) -> None:
    for state in copy_of(text_run, job).glob("step_*/state.json"):
        state.write_text("")
    before = metrics_of(job)
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole \(passed over step_00000008: .*damaged"):
        Run.prepare(TrainConfig(**job), world_size=1, cuda=False)
    assert metrics_of(job) == before


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
    with pytest.raises(UserError, match=r"out has no checkpoint of step 5: .* \(step_0000000\d, .*step_00000008\)"):
        Run.prepare(TrainConfig(**job | {"resume": 5}), world_size=1, cuda=False)


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
    import io

    step = checkpoint.resolve(values["output"])
    sums: dict[str, float] = {}
    for record in read_metadata(step):
        if record.key.startswith("optimizer."):
            data = step.read(record.file, record.offset, record.size)
            value = float(torch.load(io.BytesIO(data), weights_only=True).double().sum())
            sums[record.key] = sums.get(record.key, 0.0) + value
    return sums


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
