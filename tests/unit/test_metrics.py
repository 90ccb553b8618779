"""metrics.jsonl over several starts: appended to, or moved aside, never lost."""

import json
import math
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import nn

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.metrics import ASIDE, METRICS, Metrics, RankTimes, StepMetrics, process_age
from trainer.metrics.appended import AppendedFile
from trainer.stopping import BAD_STEPS, FiniteGuard


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 1.0}) + "\n"


def start(folder: Path, step: int) -> str:
    with Metrics(Folder(str(folder)), step, 10) as metrics:
        return metrics.notes


def test_entries_wait_while_the_disk_refuses(tmp_path: Path) -> None:
    """A full one writes a part of what it is given; where one is away, its mount point is empty."""
    disk = tmp_path / "disk"
    disk.mkdir()
    file, path = AppendedFile(disk / METRICS), disk / METRICS
    path.write_text("0\n")
    assert file.write(b"1\n") == ""
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    assert file.write(b"2\n") == file.write(b"3\n") == "[Errno 28] No space left on device"
    path.unlink()
    assert file.write(b"4\n") == f"[Errno 2] No such file or directory: '{path}'"
    assert list(disk.iterdir()) == []
    assert file.close() == f"the last 3 entries of {path} are lost ([Errno 2] No such file or directory: '{path}')"
    path.write_text("0\n1\n2")
    assert file.write(b"5\n") == file.close() == ""
    assert path.read_text() == "0\n1\n2\n3\n4\n5\n"


def test_a_run_that_slept_while_another_took_its_place_writes_nothing_there(tmp_path: Path) -> None:
    taken: list[bool] = []
    with Metrics(Folder(str(tmp_path)), 0, 10, owns=lambda: not taken) as metrics:
        metrics.report(step_metrics(RankTimes.of([0.1, 0.0])))
        taken.append(True)
        assert start(tmp_path, 0).startswith("1 line(s)")
        (tmp_path / METRICS).write_text("the other's\n")
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        metrics.report(step_metrics(RankTimes.of([0.1, 0.0])))
        metrics.publish()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_lines_of_steps_that_are_done_again_and_damaged_ones_move_aside(tmp_path: Path) -> None:
    damaged = ['{"step": 2, "lo\n', '{"no": 1}\n', "[3]\n", '{"step": "4"}\n', "\x00\x00\n", '{"step": true}\n']
    (tmp_path / METRICS).write_text(line(1) + "".join(damaged) + line(2) + line(3) + line(4) + '{"step": 5, "loss"')
    assert start(tmp_path, 2) == f"2 line(s) of steps after 2 and 7 damaged line(s) moved from {METRICS} to {ASIDE}"
    assert (tmp_path / METRICS).read_text() == line(1) + line(2)
    assert (tmp_path / ASIDE).read_text() == "".join(damaged) + line(3) + line(4) + '{"step": 5, "loss"\n'
    assert start(tmp_path, 2) == ""
    (tmp_path / METRICS).write_text(line(1) + line(2).strip())  # whole, but an editor took its end
    assert start(tmp_path, 2) == ""
    assert (tmp_path / METRICS).read_text() == line(1) + line(2)
    assert start(tmp_path, 0).startswith("2 line(s)")  # a run whose checkpoints were all lost
    assert (tmp_path / ASIDE).read_text().endswith('{"step": 5, "loss"\n' + line(1) + line(2))


def test_numbers_that_are_not_finite_end_the_run_and_name_a_weight() -> None:
    model = nn.Linear(2, 2)
    guard = FiniteGuard(model.named_parameters, lr=0.1)
    assert [guard.check_gradient(norm, 1) for norm in (math.inf, 1.0, *[math.nan] * (BAD_STEPS - 1))] == [
        True,
        False,
        *[True] * (BAD_STEPS - 1),
    ]
    with pytest.raises(
        UserError, match=f"nan in {BAD_STEPS} steps in a row, up to step 9, with finite weights: lower lr"
    ):
        guard.check_gradient(math.nan, 9)
    guard.check_losses(1.0, None, 9)
    with pytest.raises(UserError, match="held-out loss of the last step, 9, is nan"):
        guard.check_losses(1.0, math.nan, 9)
    model.weight.data[1, 0] = math.nan
    with pytest.raises(UserError, match=r"^the model at step 9: weight has 1 of 4 values that are NaN or infinite"):
        guard.check_losses(math.nan, None, 9)


def step_metrics(times: RankTimes) -> StepMetrics:
    others: dict[str, Any] = {
        "loss": 1.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "skipped": 0,
        "trained_tokens": 9,
        "tokens_per_second": 9.0,
    }
    others |= {"mfu": None, "imbalance": 1.02, "seconds": 2.0, "memory_gb": 1.0, "validation_loss": None}
    return StepMetrics(step=1, **others, **times.figures(2.0))


def test_the_slowest_rank_is_named_with_its_time_and_the_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks 0 to 2 work 1.2, 1.8 and 1.2 s, of which rank 1 waits 0.5 s for data."""
    times = RankTimes.of([1.2, 1.8, 1.2, 0.0, 0.5, 0.1])
    with Metrics(Folder(str(tmp_path)), 0, 1, ranks=3) as metrics:
        metrics.report(step_metrics(times))
    shown = capsys.readouterr().out
    assert "data wait 25%  (mean 10%)  slowest rank 1: 1.80 s, 1.29 x mean  packs max/mean 1.02  " in shown
    line = json.loads((tmp_path / METRICS).read_text())
    assert (line["slowest_rank"], line["work_seconds"]) == (1, 1.8)
    assert line["work_seconds_mean"] == pytest.approx(1.4)
    assert (line["data_wait"], line["data_wait_mean"]) == (0.25, pytest.approx(0.1))


def test_while_saves_fail_the_live_line_names_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Metrics(Folder(str(tmp_path)), 0, 1) as metrics:
        shown = []
        for failed, failures in (("no room", 1), ("", 1), ("", 0)):
            metrics.tell_saves(failed, failures, "step_00000002")
            metrics.report(step_metrics(RankTimes.of([0.1, 0.0])))
            shown.append(capsys.readouterr().out)
    assert [text.startswith("no room\n") for text in shown] == [True, False, False]
    assert ["  save failed, last is step_00000002\n" in text for text in shown] == [True, True, False]


def test_one_rank_is_not_called_the_slowest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(Folder(str(tmp_path)), 0, 1) as metrics:
        metrics.report(step_metrics(RankTimes.of([1.2, 0.2])))
    shown = capsys.readouterr().out
    assert "data wait 10%  1.0 GB" in shown
    assert "slowest" not in shown


def test_the_age_of_a_process_counts_from_its_start() -> None:
    """As psutil has it, by the clock of the wall, which nobody sets here meanwhile."""
    assert process_age() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1)
